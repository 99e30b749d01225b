"""Answers as OpenAI's clients read them: whole, or as a stream of events."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quip.serve.scores import Scored

Json = dict[str, Any]
DONE = "data: [DONE]\n\n"


@dataclass
class Text:
    """The form of one text among the choices of /v1/completions."""

    index: int
    kind = chunk_kind = "text_completion"
    said: int = 0  # characters, for the places of tokens

    def opening(self) -> Json | None:
        return None

    def part(self, text: str, tokens: Sequence[Scored], *, scored: bool) -> Json:
        return self.whole(text, tokens, None, scored=scored)

    def whole(
        self, text: str, tokens: Sequence[Scored], reason: str | None, *, scored: bool
    ) -> Json:
        logprobs = self._logprobs(tokens) if scored else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def closing(self, reason: str) -> Json:
        return self.whole("", (), reason, scored=False)

    def _logprobs(self, tokens: Sequence[Scored]) -> Json:
        offsets = []
        for token in tokens:
            offsets.append(self.said)
            self.said += token.width
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.log_p for token in tokens],
            "top_logprobs": [_likeliest(token) for token in tokens],
            "text_offset": offsets,
        }


@dataclass
class Chat:
    """The form of the answer of /v1/chat/completions."""

    index: int
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self) -> Json | None:
        return self._delta({"role": "assistant", "content": ""}, None, None)

    def part(self, text: str, tokens: Sequence[Scored], *, scored: bool) -> Json:
        return self._delta({"content": text}, _content(tokens) if scored else None, None)

    def whole(
        self, text: str, tokens: Sequence[Scored], reason: str | None, *, scored: bool
    ) -> Json:
        return {
            "index": self.index,
            "message": {"role": "assistant", "content": text},
            "logprobs": _content(tokens) if scored else None,
            "finish_reason": reason,
        }

    def closing(self, reason: str) -> Json:
        return self._delta({}, None, reason)

    def _delta(self, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }


@dataclass
class Usage:
    """Tokens of a request so far."""

    prompt: int = 0
    new: int = 0

    def as_json(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
        }


@dataclass(frozen=True)
class Envelope:
    """What stands around the choices of one request."""

    kind: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __call__(self, choices: Sequence[Json], usage: Usage | None = None) -> Json:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": [*choices],
            **({} if usage is None else {"usage": usage.as_json()}),
        }


def event(words: Json) -> str:
    """Words as one event of a stream."""
    return f"data: {json.dumps(words)}\n\n"


def _likeliest(token: Scored) -> dict[str, float] | None:
    """The likeliest tokens by their text, and the token itself; None at the start of a prompt."""
    if token.log_p is None:
        return None
    # Tokens may share a text, as halves of characters do: the likeliest one, written last, stays.
    return {token.text: token.log_p} | dict(reversed(token.top))


def _content(tokens: Sequence[Scored]) -> Json:
    return {
        "content": [
            {
                **_named(token.text, token.log_p),
                "top_logprobs": [_named(text, log_p) for text, log_p in token.top],
            }
            for token in tokens
        ]
    }


def _named(text: str, log_p: float | None) -> Json:
    return {"token": text, "logprob": log_p, "bytes": [*text.encode()]}
