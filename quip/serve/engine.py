"""One text after the other, on a thread of its own, for a server that waits for none of them."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quip.serve.adapters import Adapters
from quip.serve.generate import write
from quip.serve.refused import Refused
from quip.serve.sampling import Sampling
from quip.serve.scores import Scored, named, score
from quip.serve.stops import Stops

WAITING = 1024  # texts: a server that is asked for more says so, before memory does


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One text to write."""

    ids: list[int]
    max_new_tokens: int  # 0: only the prompt is scored
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    top: int | None  # how many alternatives of each token; None: no probabilities
    echo: str | None  # the prompt, where it is part of the text
    chat: bool
    adapter: str | None


@dataclass(frozen=True)
class Piece:
    """Text, and what is known of the tokens since the piece before, if it was asked for."""

    text: str
    tokens: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of a text, which is the last that comes of it."""

    reason: Literal["stop", "length"]
    new_tokens: int


@runtime_checkable
class Engine(Protocol):
    """What writes texts."""

    waiting: int  # texts that are not complete

    def check(self, ask: Ask) -> None:
        """Raise Refused for what this engine cannot do."""

    def write(self, ask: Ask) -> AsyncGenerator[Piece | Ended, None]:
        """The text, piece by piece; when the iterator is closed, nothing more is computed."""

    def close(self) -> None:
        """End what is being written."""


class _Stopped(Exception):
    """Nobody waits for this text any more."""


class OneByOne:
    """Texts in the order in which they were asked for; those of adapters between the others."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Adapters | None = None,
    ) -> None:
        self._model, self._tokenizer, self._adapters = model, tokenizer, adapters
        # One thread: what torch compiles or captures belongs to the thread that did it.
        self._pool = ThreadPoolExecutor(1, "quip")
        self._closed = threading.Event()
        self.waiting = 0

    def check(self, ask: Ask) -> None:
        if self.waiting >= WAITING:
            raise Refused(f"{self.waiting} texts wait already; ask again later", status=503)

    async def write(self, ask: Ask) -> AsyncGenerator[Piece | Ended, None]:
        loop = asyncio.get_running_loop()
        found: asyncio.Queue[Piece | Ended | Exception] = asyncio.Queue()
        stopped = threading.Event()

        def post(item: Piece | Ended | Exception) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(found.put_nowait, item)

        self.waiting += 1
        work = self._pool.submit(self._work, ask, post, stopped)
        try:
            while True:
                item = await found.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Ended):
                    return
        finally:
            self.waiting -= 1
            stopped.set()
            work.cancel()  # if it has not begun

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def _work(self, ask: Ask, post: Callable[[Any], None], stopped: threading.Event) -> None:
        def check() -> None:
            if stopped.is_set() or self._closed.is_set():
                raise _Stopped

        try:
            check()
            with self._adapters.active(ask.adapter) if self._adapters else nullcontext():
                self._write(ask, post, check)
        except _Stopped:
            post(Ended("stop", 0))
        except Exception as error:  # of whoever asked, who is told
            post(error)

    def _write(self, ask: Ask, post: Callable[[Any], None], check: Callable[[], None]) -> None:
        if ask.echo is not None:
            post(Piece(ask.echo))
        if ask.max_new_tokens == 0 and ask.top is None:
            post(Ended("length", 0))
            return
        steps = _Steps(ask, self._tokenizer, check)
        rng = torch.Generator()
        rng.seed() if ask.seed is None else rng.manual_seed(ask.seed)
        answer = write(
            self._model,
            self._tokenizer,
            ask.ids,
            before=[] if ask.chat else ask.ids,
            max_new_tokens=max(ask.max_new_tokens, 1),
            sampling=ask.sampling,
            rng=rng,
            watch=steps,
        )
        stops = Stops(ask.stops)
        for piece in answer:
            if ask.max_new_tokens and (text := stops.feed(piece)):
                post(Piece(text, steps.take()))
            if stops.found:
                break
        if ask.max_new_tokens == 0:
            steps.found.pop()
        post(Piece(stops.rest(), steps.take()))
        stop = stops.found or answer.ended == "stop"
        new_tokens = min(answer.new_tokens, ask.max_new_tokens)
        post(Ended("stop" if stop else "length", new_tokens))


class _Steps:
    """What is seen of each step: its probabilities, and whether anybody waits for it."""

    def __init__(
        self, ask: Ask, tokenizer: PreTrainedTokenizerBase, check: Callable[[], None]
    ) -> None:
        self._ask, self._tokenizer, self._check = ask, tokenizer, check
        self.whole = ask.echo is not None and ask.top is not None
        self._prompt = self.whole  # still to be scored
        self.found: list[Scored] = []

    def __call__(self, logits: Float[Tensor, "s vocab"], token: int) -> None:
        self._check()
        if self._ask.top is None:
            return
        if self._prompt:
            first, *others = self._ask.ids
            self.found.append(named(self._tokenizer, first))
            self.found += score(self._tokenizer, logits[:-1], others, self._ask.top)
            self._prompt = False
        self.found += score(self._tokenizer, logits[-1:], [token], self._ask.top)

    def take(self) -> tuple[Scored, ...]:
        """What has been found since the last time."""
        found, self.found = tuple(self.found), []
        return found
