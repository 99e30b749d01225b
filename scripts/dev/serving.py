"""`quip serve` as a process of its own, and requests to it, for what is measured of it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JSON = {"content-type": "application/json"}
PATH = "/v1/completions"


@dataclass(frozen=True)
class Server:
    """A server that answers on a port of this machine."""

    port: int
    pid: int

    def open(self, body: dict[str, Any], path: str = PATH) -> http.client.HTTPConnection:
        """A connection on which a request has been sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", path, json.dumps(body), JSON)
        return connection

    def ask(self, body: dict[str, Any], path: str = PATH) -> tuple[int, str]:
        """Status and text of the whole answer, a stream or not."""
        connection = self.open(body, path)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def status(self, word: str) -> int:
        """A number of /proc/PID/status: VmRSS and VmHWM are in kB."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"^{word}:\s+(\d+)", text, re.MULTILINE)[1])


@contextmanager
def serving(model: str, *flags: str, **environment: str) -> Iterator[Server]:
    """Serve a model while the block runs. It has to end by itself once it is told to."""
    line = [sys.executable, "-m", "quip", "serve", model, "--port", "0", *flags]
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
    )
    try:
        said = process.stdout.readline()
        if not said:
            raise SystemExit(f"{' '.join(line)} did not start")
        yield Server(int(re.search(r":(\d+)/v1", said)[1]), process.pid)
        process.send_signal(signal.SIGTERM)
        if status := process.wait(60):
            raise SystemExit(f"the server ended with {status}")
    finally:
        process.kill()
