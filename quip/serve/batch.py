"""Texts computed together, by transformers' continuous batching with its paged cache.

Each text has its own temperature, top_k and top_p; transformers gives them one seed, and no
probabilities of alternatives, so a request for these is refused.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from quip.serve.engine import WAITING, Ask, Ended, Piece
from quip.serve.generate import stop_tokens
from quip.serve.refused import Refused
from quip.serve.served import Served
from quip.serve.stops import Stops
from quip.serve.text import IncrementalDecoder

TOGETHER, LONG = 16, 1024  # texts of so many tokens have room in the cache on a CPU
PAGE = 64  # tokens of a page of the cache
AT_ONCE = 512  # tokens of a step
ONLY = "start the server without --continuous_batching"


class Batched:
    """As many texts at once as the cache holds; others wait until there is room."""

    def __init__(self, served: Served, state: Any) -> None:
        self._tokenizer, self._all = served.tokenizer, served.words
        self._ends = sorted(stop_tokens(served.model, served.tokenizer))
        limit = served.limit
        room = max(limit, TOGETHER * min(limit, LONG))
        # /health asks this manager whether its worker lives.
        self._manager = state.get_manager(served.name, use_cb=True)
        self._manager._cb_config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=None if served.model.device.type == "cuda" else -(-room // PAGE),
            max_batch_tokens=AT_ONCE,
            per_request_processors=True,
        )
        # Values that are no defaults: with others there would be nothing to say a request's in.
        common = GenerationConfig(
            do_sample=True,
            temperature=0.5,
            top_k=1,
            top_p=0.5,
            max_new_tokens=limit,
            eos_token_id=self._ends or None,
            pad_token_id=0,
            use_cache=False,
        )
        self._manager.init_cb(served.model, common)
        self._requests = self._manager._cb
        self.waiting = 0

    def check(self, ask: Ask) -> None:
        if self.waiting >= WAITING:
            raise Refused(f"{self.waiting} texts wait already; ask again later", status=503)
        if ask.top is not None:
            raise Refused(f"logprobs are not known where requests are computed together; {ONLY}")
        if ask.seed is not None and ask.sampling.draws:
            raise Refused(f"seed {ask.seed}: requests computed together have one seed; {ONLY}")

    async def write(self, ask: Ask) -> AsyncGenerator[Piece | Ended, None]:
        if ask.echo is not None:
            yield Piece(ask.echo)
        if ask.max_new_tokens == 0:
            yield Ended("length", 0)
            return
        name, found = uuid.uuid4().hex, asyncio.Queue[Any]()
        self._begin(name, ask, found)
        decoder = IncrementalDecoder(self._tokenizer, [] if ask.chat else ask.ids)
        stops, count, finished = Stops(ask.stops), 0, False
        self.waiting += 1
        try:
            while not (finished or stops.found):
                output = await found.get()
                finished = output.is_finished()
                if output.error is not None:
                    raise RuntimeError(output.error)
                new = output.generated_tokens[count:]
                count += len(new)
                pieces = [decoder.add(token) for token in new if token not in self._ends]
                if text := stops.feed("".join(pieces)):
                    yield Piece(text)
            if text := stops.feed(decoder.rest()) + stops.rest():
                yield Piece(text)
            ended = stops.found or (count and output.generated_tokens[-1] in self._ends)
            yield Ended("stop" if ended else "length", count)
        finally:
            self.waiting -= 1
            if not finished:
                self._requests.cancel_request(name)
                self._requests.output_router.result_handlers.pop(name, None)

    def _begin(self, name: str, ask: Ask, found: "asyncio.Queue[Any]") -> None:
        sampling = ask.sampling
        self._requests.register_result_handler(name, found.put_nowait)
        added = self._requests.add_request(
            ask.ids,
            request_id=name,
            max_new_tokens=ask.max_new_tokens,
            streaming=True,
            eos_token_id=self._ends or None,
            temperature=float(sampling.temperature) if sampling.draws else 1.0,
            top_k=(sampling.top_k or self._all) if sampling.draws else 1,
            top_p=1.0 if sampling.top_p is None else float(sampling.top_p),
        )
        if added is None:
            raise Refused("the server is ending", status=503)

    def close(self) -> None:
        self._manager.stop()
