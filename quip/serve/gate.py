"""What stands between the network and the app: who may ask, how much, and one line a request."""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any

from quip.serve.answers import Usage
from quip.serve.refused import Refused

BYTES = 4 << 20  # of a request
THROWN_AWAY = 64 << 20  # bytes: who still sends does not read why it is refused
SECONDS = 30.0  # in which its bytes are to be here
GONE = 499  # the status in the log where nobody waited for the answer

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Gate:
    """An ASGI app around another one.

    With a `key`, all but /health asks for it. `hosts` are the names that a request may call the
    server by, None for any: a page in a browser that resolves its own name to this machine calls
    it by another. `say` is given a line a request, in which nothing stands that was asked.
    """

    def __init__(
        self,
        app: Any,
        *,
        key: str | None,
        hosts: Collection[str] | None,
        say: Callable[[str], object],
    ) -> None:
        self._app, self._hosts, self._say = app, hosts, say
        self._key = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, body = time.perf_counter(), GONE, None
        usage = scope.setdefault("state", {})["usage"] = Usage()

        async def note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            body = await _read(receive)
            if not await _attended(self._app, scope, body, receive, note):
                status = GONE
        except Refused as refused:
            if body is None and refused.status not in (408, 413):  # it may still be on its way
                with suppress(Refused):
                    await _read(receive)
            await _refuse(refused, note)
        finally:
            seconds = time.perf_counter() - start
            path = ascii(scope["path"][:80])[1:-1]
            self._say(
                f"{scope['method']} {path} {status}, {usage.prompt} + {usage.new} tokens, "
                f"{seconds:.2f} s"
            )

    def _check(self, scope: Scope) -> None:
        """Raise Refused before a byte of the body is read."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and _without_port(host) not in self._hosts:
            raise Refused(
                f"the host {host[:80]!a} is not how this server is called; use "
                f"{' or '.join(sorted(self._hosts))}",
                status=403,
            )
        if self._key is not None and scope["path"] != "/health":
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(_digest(given.strip()), self._key)
            if kind.lower() != b"bearer" or not right:
                raise Refused(
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    status=401,
                    code="invalid_api_key",
                )
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            # Which a page of another site cannot send without asking first.
            raise Refused("the content type is not application/json; send JSON", status=415)


async def _read(receive: Receive) -> bytes:
    """The body of a request. Raises Refused for one that is too large, or that does not come."""
    found, size, more = bytearray(), 0, True
    try:
        async with asyncio.timeout(SECONDS):
            while more and size <= THROWN_AWAY:
                message = await receive()
                part = message.get("body", b"")
                size += len(part)
                if size <= BYTES:
                    found += part
                more = message.get("more_body", False)  # and not, where the client has gone
    except TimeoutError as error:
        raise Refused(f"the request did not come within {SECONDS:g} s", status=408) from error
    if size > BYTES:
        raise Refused(f"the request has more than {BYTES} bytes; send less at once", status=413)
    return bytes(found)


async def _attended(app: Any, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
    """Let the app answer for as long as the client is there; whether it was until the end."""
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    gone, said = asyncio.Event(), False

    async def replay() -> Any:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def tell(message: Any) -> None:
        nonlocal said
        await send(message)
        said = message["type"] == "http.response.body" and not message.get("more_body", False)

    answer = asyncio.ensure_future(app(scope, replay, tell))
    leaving = asyncio.ensure_future(watch())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        if said:  # after which a server says that the client has gone, too
            await answer
        if answer.done():
            answer.result()
        return said
    finally:
        gone.set()
        for task in (answer, leaving):
            task.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)


async def _refuse(refused: Refused, send: Send) -> None:
    body = json.dumps(refused.body).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _digest(key: bytes) -> bytes:
    """Bytes of one length, so that to compare them tells nothing of the length of the key."""
    return hashlib.sha256(key).digest()


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
