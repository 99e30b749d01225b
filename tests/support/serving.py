"""A server in the tests' own process, on a free port, and what asks it."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quip.serve.engine import Engine
from quip.serve.served import Served
from quip.serve.server import build_app, listen, server_of

KEY = "a-key"
JSON = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}


@dataclass
class Door:
    """A server that runs."""

    port: int
    engine: Engine
    served: Served
    lines: list[str] = field(default_factory=list)  # its log

    def client(self, key: str = KEY) -> Any:
        import openai

        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key=key, max_retries=0)

    def ask(
        self, path: str, body: object = None, method: str = "POST", **headers: str
    ) -> tuple[int, Any]:
        """Status and answer of a request; what is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, JSON | named)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text)

    def refusal(self, path: str, body: object = None, **options: str) -> str:
        """Status and message of a refusal, in OpenAI's form and on one line."""
        status, answer = self.ask(path, body, **options)
        assert answer.keys() == {"error"}
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        assert "\n" not in answer["error"]["message"]
        return f"{status}: {answer['error']['message']}"


@contextmanager
def serving(served: Served, *, key: str | None = KEY, **options: Any) -> Iterator[Door]:
    """Serve a model while the block runs."""
    lines: list[str] = []
    app, engine = build_app(served, key=key, say=lines.append, **options)
    server = server_of(app)
    with listen("127.0.0.1", 0) as found:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
        thread.start()
        until(lambda: server.started)
        try:
            yield Door(found.getsockname()[1], engine, served, lines)
        finally:
            server.should_exit = True
            thread.join(30)
            engine.close()
    assert not thread.is_alive()


def until(done: Callable[[], object]) -> None:
    """Wait for what another thread does; a minute is far more than it takes."""
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, "what was waited for has not happened"
        time.sleep(0.01)
