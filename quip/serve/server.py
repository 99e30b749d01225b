"""transformers' own server (`transformers serve`), with a model of quip's and routes of quip's.

Its app, its health and its batching stay; what is loaded, what may be asked, and how an answer is
written is said here. It never loads what a request names.
"""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from quip.errors import Unavailable, how_to_install
from quip.serve.adapters import Adapters
from quip.serve.engine import Engine, OneByOne
from quip.serve.gate import Gate
from quip.serve.served import Served

NEEDED = ("fastapi", "uvicorn", "pydantic", "openai")  # by transformers.cli.serve
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_installed() -> None:
    """Raise Unavailable, with what to type, where a package is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise Unavailable(
            f"quip serve needs the package {missing[0]}; install it with: {how_to_install('serve')}"
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, and answers nobody yet. Raises Unavailable where it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise Unavailable(
            f"--host {host} --port {port} cannot be served ({error.strerror or error}); choose "
            "others, or --port 0 for any that is free"
        ) from error
    return found


def build_app(
    served: Served,
    *,
    adapters: Adapters | None = None,
    continuous_batching: bool = False,
    key: str | None = None,
    host: str = LOOPBACK[0],
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Any, Engine]:
    """The app, and the engine that writes its texts."""
    from transformers.cli.serve import Serve

    from quip.serve.routes import add_routes

    class Unstarted(Serve):
        def start_server(self) -> None:
            """Start nothing: the app is not complete."""

    theirs = Unstarted(
        continuous_batching=continuous_batching, log_level="error", non_blocking=True
    )
    app: Any = theirs.server.config.app
    if continuous_batching:
        from quip.serve.batch import Batched

        engine: Engine = Batched(served, theirs._generation_state)
    else:
        engine = OneByOne(served.model, served.tokenizer, adapters)
    add_routes(app, served, engine)
    open_to = None if key is not None or host not in LOOPBACK else {*LOOPBACK, "[::1]"}
    app.add_middleware(Gate, key=key, hosts=open_to, say=say)
    return app, engine


def run(app: Any, engine: Engine, found: socket.socket) -> None:
    """Answer what is asked until SIGINT or SIGTERM; a second SIGINT ends that at once, too."""
    server = server_of(app)
    with _noted_by_server():
        asyncio.run(server.serve(sockets=[found]))
    engine.close()


def server_of(app: Any) -> Any:
    """uvicorn's server of an app, which says nothing of requests itself."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False, timeout_keep_alive=30
        )
    )


@contextmanager
def _noted_by_server() -> Iterator[None]:
    """Let a signal that uvicorn has handled, and hands on once it has ended, do no more."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda number, frame: None) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
