"""What a request asks for: its JSON, of the shape that OpenAI's documents give it, or a refusal.

A field that would change the answer and is not served is refused by its name, not left out; one
whose value says what happens anyway is taken.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

from quip.errors import shown
from quip.reading import parse_json
from quip.serve.refused import Refused
from quip.shapes import Within

VALUES = 6e5  # of a request's JSON: tokens of as many prompts as a request may hold
PROMPTS = 256
STOPS = 16
TOP = 20  # alternatives of a token


class StreamOptions(TypedDict):
    include_usage: NotRequired[bool | None]


class Common(TypedDict):
    """The fields of both kinds of requests."""

    model: NotRequired[str | None]
    max_tokens: NotRequired[int | None]
    temperature: NotRequired[float | None]
    top_p: NotRequired[float | None]
    top_k: NotRequired[int | None]
    seed: NotRequired[int | None]
    stop: NotRequired[str | Annotated[list[str], Within(0, STOPS)] | None]
    stream: NotRequired[bool | None]
    stream_options: NotRequired[StreamOptions | None]


class Text(Common):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: NotRequired[bool | None]
    logprobs: NotRequired[Annotated[int, Within(0, TOP)] | None]


class Part(TypedDict):
    type: str
    text: NotRequired[str]


class Message(TypedDict):
    role: str
    content: str | list[Part]


class Chat(Common):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Within(1, 10_000)]
    max_completion_tokens: NotRequired[int | None]
    logprobs: NotRequired[bool | None]
    top_logprobs: NotRequired[Annotated[int, Within(0, TOP)] | None]


UNREAD = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that are not served, and the values of them that ask for nothing, beside null.
NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
Prompt = str | list[int] | list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request as it was said; None is what was left open."""

    prompts: list[Prompt]  # texts, tokens, or one conversation
    chat: bool
    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool
    top: int | None  # how many alternatives of each token; None: no probabilities at all


def read_text(body: bytes) -> Asked:
    """A request to /v1/completions. Raises Refused."""
    words = _read(body, Text)
    prompt = words["prompt"]
    one = isinstance(prompt, str) or bool(prompt and isinstance(prompt[0], int))
    prompts = [prompt] if one else prompt
    if not 0 < len(prompts) <= PROMPTS:
        raise Refused(
            f"prompt holds {len(prompts)} prompts, not 1 to {PROMPTS}; send more requests"
        )
    return Asked(
        prompts=prompts,
        chat=False,
        max_tokens=words.get("max_tokens"),
        echo=bool(words.get("echo")),
        top=words.get("logprobs"),
        **_common(words),
    )


def read_chat(body: bytes) -> Asked:
    """A request to /v1/chat/completions. Raises Refused."""
    words = _read(body, Chat)
    messages = [{"role": x["role"], "content": _plain(x["content"])} for x in words["messages"]]
    most = words.get("max_completion_tokens")
    top = words.get("top_logprobs")
    if top and not words.get("logprobs"):
        raise Refused(f"top_logprobs {top} needs logprobs: true")
    return Asked(
        prompts=[messages],
        chat=True,
        max_tokens=words.get("max_tokens") if most is None else most,
        echo=False,
        top=(top or 0) if words.get("logprobs") else None,
        **_common(words),
    )


def _read(body: bytes, shape: Any) -> Any:
    try:
        words = parse_json(body.decode(), shape, values=VALUES)
    except ValueError as error:  # what is no UTF-8 is one, too
        raise Refused(f"the request is no valid JSON of its kind: {error}") from error
    for name in words.keys() - shape.__required_keys__ - shape.__optional_keys__ - {*UNREAD}:
        value = words[name]
        if value is not None and value not in NOTHING.get(name, ()):
            raise Refused(
                f"{shown(name)} {json.dumps(value)[:50]} is not served here; leave it out"
            )
    return words


def _common(words: Common) -> dict[str, Any]:
    stop = words.get("stop") or []
    options = words.get("stream_options") or {}
    return {
        "model": words.get("model"),
        "temperature": _real(words.get("temperature")),
        "top_p": _real(words.get("top_p")),
        "top_k": words.get("top_k"),
        "seed": words.get("seed"),
        "stops": (stop,) if isinstance(stop, str) else tuple(stop),
        "stream": bool(words.get("stream")),
        "include_usage": bool(options.get("include_usage")),
    }


def _real(number: float | int | None) -> float | None:
    return None if number is None else float(number)  # JSON's 1 is whole


def _plain(content: str | list[Part]) -> str:
    """The text of a message, whose parts are all text."""
    if isinstance(content, str):
        return content
    if other := [part["type"] for part in content if part["type"] != "text"]:
        raise Refused(f"a message holds a part of type {shown(other[0])}; only text is served")
    return "".join(part.get("text", "") for part in content)
