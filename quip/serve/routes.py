"""The routes that quip answers itself, on the app of transformers' server.

Those of transformers 5.23 for the same paths take one text only as a prompt, leave out `logprobs`
and `echo`, draw only where the model's generation_config does, whatever `temperature` says, set
`seed` for all requests at once, keep the `stop` in the text, compute on where nobody waits for a
whole answer, fail past the model's last position, and load any model that a request names.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from quip.errors import NonFinite
from quip.serve.answers import DONE, Chat, Envelope, Json, Text, Usage, event
from quip.serve.engine import Ask, Ended, Engine
from quip.serve.refused import Refused
from quip.serve.requests import Asked, read_chat, read_text
from quip.serve.scores import Scored
from quip.serve.served import Served

log = logging.getLogger(__name__)


def add_routes(app: FastAPI, served: Served, engine: Engine) -> None:
    """Leave an app its /health, and answer all else that is answered here."""
    app.router.routes[:] = [x for x in app.router.routes if getattr(x, "path", "") == "/health"]

    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        return await _answer(served, engine, request, read_text)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await _answer(served, engine, request, read_chat)

    @app.get("/v1/models")
    async def models() -> Any:
        return JSONResponse({"object": "list", "data": [*map(_card(served), served.names)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name not in served.names:
            raise Refused(f"the model is not one of {', '.join(served.names)}", status=404)
        return JSONResponse(_card(served)(name))

    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(HTTPException, _refuse)


async def _refuse(request: Request, error: Exception) -> Any:
    refused = _refusal(error)
    return JSONResponse(refused.body, status_code=refused.status)


def _refusal(error: Exception) -> Refused:
    """What is said of an error: of one that nobody expected nothing but that it happened."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, HTTPException):
        return Refused(str(error.detail), status=error.status_code)
    if isinstance(error, NonFinite):
        return Refused(str(error), status=500)
    log.error("a request failed", exc_info=error)
    return Refused("the server failed; its log says why", status=500)


def _card(served: Served) -> Callable[[str], Json]:
    def card(name: str) -> Json:
        own = {"id": name, "object": "model", "created": 0, "owned_by": "quip"}
        more = {"max_model_len": served.limit}
        return own | more | ({} if name == served.name else {"parent": served.name})

    return card


async def _answer(
    served: Served, engine: Engine, request: Request, read: Callable[[bytes], Asked]
) -> Any:
    try:
        return await _written(served, engine, request, read)
    except Exception as error:
        return await _refuse(request, error)


async def _written(
    served: Served, engine: Engine, request: Request, read: Callable[[bytes], Asked]
) -> Any:
    asked = read(await request.body())
    asks = await asyncio.to_thread(served.asks, asked)  # which may have a book to tokenize
    for ask in asks:
        engine.check(ask)
    usage = request.state.usage
    usage.prompt = sum(len(ask.ids) for ask in asks)
    form = Chat if asked.chat else Text
    name = asked.model or served.name
    if asked.stream:
        envelope = Envelope(form.chunk_kind, name)
        parts = _events(engine, asks, form, envelope, usage, asked.include_usage)
        return StreamingResponse(parts, media_type="text/event-stream")
    choices = await _together(
        [_whole(engine, ask, form(index), usage) for index, ask in enumerate(asks)]
    )
    return JSONResponse(Envelope(form.kind, name)(choices, usage))


async def _together(works: list[Any]) -> list[Json]:
    """The results of all; where one fails, the others end as well."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


async def _whole(engine: Engine, ask: Ask, form: Text | Chat, usage: Usage) -> Json:
    text, tokens, reason = "", list[Scored](), "stop"
    async with aclosing(engine.write(ask)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Ended):
                reason = piece.reason
                usage.new += piece.new_tokens
            else:
                text += piece.text
                tokens += piece.tokens
    return form.whole(text, tokens, reason, scored=ask.top is not None)


async def _events(
    engine: Engine,
    asks: list[Ask],
    form: type[Text] | type[Chat],
    envelope: Envelope,
    usage: Usage,
    include_usage: bool,
) -> AsyncIterator[str]:
    """The events of a stream; an error is one of them, since the status has been sent by then."""
    try:
        for index, ask in enumerate(asks):
            choice = form(index)
            if (opening := choice.opening()) is not None:
                yield event(envelope([opening]))
            async with aclosing(engine.write(ask)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Ended):
                        usage.new += piece.new_tokens
                        yield event(envelope([choice.closing(piece.reason)]))
                    elif piece.text or piece.tokens:
                        scored = ask.top is not None
                        part = choice.part(piece.text, piece.tokens, scored=scored)
                        yield event(envelope([part]))
        if include_usage:
            yield event(envelope([], usage))
        yield DONE
    except Exception as error:
        yield event(_refusal(error).body)
