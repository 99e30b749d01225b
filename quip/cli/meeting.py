"""Where the processes of a team meet: process 0 says in torchrun's store where it listens."""

import json
import os
import secrets
import socket
from contextlib import suppress
from datetime import timedelta
from typing import Any

COME = timedelta(minutes=10)  # for all to start
REACH = 10  # seconds for a connection
# Seconds until an idle connection is asked for a sign of life, between questions, and how many.
ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}


def listen() -> tuple[socket.socket, str]:
    """A socket at which process 0 can be found, and a secret that the team alone knows."""
    listener, secret = socket.create_server(("", 0), backlog=1024), secrets.token_hex()
    words = {"port": listener.getsockname()[1], "places": _places(), "secret": secret}
    _store().set(_key(), json.dumps(words))
    return listener, secret


def meet() -> tuple[socket.socket, str]:
    """A connection to process 0, and the secret. Raises OSError or RuntimeError where none is."""
    words = json.loads(_store().get(_key()))  # waits for it
    reasons = []
    for place in words["places"]:
        try:
            found = socket.create_connection((place, words["port"]), timeout=REACH)
        except OSError as error:
            reasons.append(f"{place}: {error}")
            continue
        found.settimeout(None)
        return kept_alive(found), words["secret"]
    raise OSError(f"process 0 cannot be reached at port {words['port']} ({'; '.join(reasons)})")


def kept_alive(connection: socket.socket) -> socket.socket:
    """The connection, whose end is noticed within half a minute also where a machine fails."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _places() -> list[str]:
    """Names of this machine: the one by which it reaches the store first."""
    found, store = [], (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    with suppress(OSError), socket.create_connection(store, timeout=REACH) as connection:
        found.append(connection.getsockname()[0])
    return [*dict.fromkeys([*found, socket.gethostname(), store[0]])]


def _store() -> Any:
    from torch.distributed import TCPStore

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(*place, is_master=False, timeout=COME)


def _key() -> str:
    return f"quip/lines/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
