"""`quip serve`: what it refuses before a port is open, what it says, and how it ends."""

import json
import os
import re
import signal
import socket
import threading

import pytest

from tests.support.checkpoints import edit

pytestmark = pytest.mark.usefixtures("command")

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package)

from tests.support.serving import until  # noqa: E402


@pytest.fixture(autouse=True)
def keyless(monkeypatch):
    monkeypatch.delenv("QUIP_API_KEY", raising=False)


@pytest.fixture
def shut(monkeypatch):
    """No port may be opened."""
    monkeypatch.setattr(socket.socket, "listen", lambda *_: pytest.fail("a port was opened"))
    monkeypatch.setattr("quip.serve.server.run", lambda *_: pytest.fail("it was served"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--host '0.0.0.0' lets others ask: give --api_key_file FILE, or"),
        (["--api_key", ""], "the API key is empty, or holds more than printable ASCII"),
        (["--api_key", "a b"], "the API key is empty, or holds more than printable ASCII"),
        (["--api_key", "a", "--api_key_file", "b"], "both say the key: leave one out"),
        (["--api_key", "a", "--without_key"], "--without_key speaks of no key, and there is one"),
        (["--lora", "terse"], "--lora 'terse': NAME=DIR is expected"),
        (["--lora", "a=b", "--lora", "a=c"], "--lora a: the name is given twice"),
        (["--lora", "a=b", "--continuous_batching"], "--lora: adapters take turns"),
        (["--lora", "demo=a"], "--lora demo: the model itself has that name; choose another"),
        (["--port", "x"], "argument --port"),
        (["--port", "65536"], "--port 65536: from 0 to 65535"),
        (["--port", "-1"], "--port -1: from 0 to 65535"),
    ],
)
def test_a_line_that_means_nothing_is_refused(quip, shut, words, message):
    status, out, err = quip("serve", "demo", *words)
    assert (status, out, len(err)) == (2, "", 1)
    assert message in err[0]


def test_a_folder_that_is_no_complete_checkpoint_is_refused_before_a_port_is_open(
    quip, shut, copy, tmp_path
):
    (tmp_path / "empty").mkdir()
    edit(copy, modules=["no.such"])
    gone = tmp_path / "gone"
    for folder in (copy, tmp_path / "empty", gone):
        status, out, err = quip("serve", folder)
        assert (status, out, len(err)) == (1, "", 1)
        assert err[0].startswith(f"quip: {folder}: ")


def test_what_is_missing_is_named(quip, shut, packed, tmp_path, monkeypatch):
    for words, message in (
        (["--chat_template", tmp_path / "none"], "cannot be read"),
        (["--lora", f"x={tmp_path}"], f"--lora x: {tmp_path} has no adapter_config.json"),
        (["--host", "203.0.113.1", "--without_key"], "--host 203.0.113.1 --port 8000 cannot be"),
    ):
        status, _, err = quip("serve", packed, *words)
        assert (status, len(err)) == (1, 1)
        assert message in err[0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        status, _, err = quip("serve", packed, "--port", port)
    assert (status, len(err)) == (1, 1)
    assert f"--port {port} cannot be served (Address already in use); choose others" in err[0]
    monkeypatch.setattr("quip.serve.server.find_spec", lambda name: None)
    status, _, err = quip("serve", packed)
    assert (status, len(err)) == (1, 1)
    assert "quip serve needs the package fastapi; install it with: pip install" in err[0]


def ask(port: int, body: dict, key: str | None) -> socket.socket:
    """A connection on which a request has been sent."""
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port}\r\n"
    head += f"Content-Length: {len(text)}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\n\r\n"
    raw = socket.create_connection(("127.0.0.1", port), timeout=60)
    raw.sendall(head.encode() + text)
    return raw


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_once_what_was_asked_is_answered(
    quip, packed, tmp_path, monkeypatch, number
):
    from quip.serve.stops import Stops

    begun, told = threading.Event(), threading.Event()
    feed = Stops.feed

    def feed_slowly(self: Stops, piece: str) -> str:
        begun.set()
        assert told.wait(60)
        return feed(self, piece)

    monkeypatch.setattr(Stops, "feed", feed_slowly)
    monkeypatch.setenv("QUIP_API_KEY", "from-the-environment")
    said: list[str] = []
    monkeypatch.setattr("quip.cli.serve.say", said.append)
    answers: list[bytes] = []

    def client() -> None:
        until(lambda: said)
        port = int(re.search(r":(\d+)/v1", said[0])[1])
        words = {"prompt": "abc", "max_tokens": 20, "stream": True}
        with ask(port, words, "wrong") as raw:
            answers.append(raw.recv(1 << 16))
        with ask(port, words, "from-the-environment") as raw:
            assert begun.wait(60)
            os.kill(os.getpid(), number)
            told.set()
            answer = b""
            while more := raw.recv(1 << 16):
                answer += more
        answers.append(answer)

    thread = threading.Thread(target=client)
    thread.start()
    status, _, err = quip("serve", packed, "--port", "0")
    thread.join()
    assert status == 0
    assert said == [said[0]]
    assert said[0].startswith(f"{packed.name} at http://127.0.0.1:")
    assert answers[0].startswith(b"HTTP/1.1 401")
    assert answers[1].startswith(b"HTTP/1.1 200")
    assert b"data: [DONE]" in answers[1]
    assert err[0].startswith("quip: no chat: the model has no chat template: use /v1/completions")
    assert [line.rpartition(",")[0] for line in err[1:]] == [
        "POST /v1/completions 401, 0 + 0 tokens",
        "POST /v1/completions 200, 3 + 20 tokens",
    ]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
