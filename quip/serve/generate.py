"""Text from a model, piece by piece as it comes, for one prompt or conversation at a time.

The cache, the positions, and what else the model's generation_config asks for (a penalty on
repetition, say) are prepared by transformers' own generate(). Only the innermost loop is ours, by
the hook that generate() has for it: as a Python generator it needs no thread to stream, an
interrupt ends it between two layers, and it draws from the generator that it is handed.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quip.errors import NonFinite, UsageError
from quip.packed.checkpoint import positions
from quip.packed.step import fixed_step
from quip.serve.prompts import read_prompt
from quip.serve.sampling import Sampling
from quip.serve.text import IncrementalDecoder

GREEDY = Sampling()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    rng: torch.Generator | None = None,
) -> "Answer":
    """The text with which the model goes on, computed while it is iterated over.

    `prompt` is a text to continue, or a conversation in messages of `role` and `content`, which
    the tokenizer's chat template turns into one. The answer ends with a stop token (an end of the
    model's generation_config, or the tokenizer's; it is not part of the text), after
    `max_new_tokens`, or at the model's last position. `rng`, on the CPU, is what a `sampling` of
    temperature above 0 draws from, and is moved on by it; other sampling needs none. It runs where
    the model is, dense or packed.

    Raises UsageError, before anything is computed, for a prompt without tokens or with more than
    the model has positions, for messages that the chat template refuses, for max_new_tokens below
    1, and for drawing without rng; while iterating, NonFinite where the model predicts NaN.

        for piece in generate(model, tokenizer, "The following"):
            print(piece, end="", flush=True)
    """
    plain = isinstance(prompt, str)
    ids = read_prompt(tokenizer, prompt)
    return write(
        model,
        tokenizer,
        ids,
        # A text goes on with the space that its first token may begin with; an answer starts anew.
        before=ids if plain else [],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        rng=rng,
        remedy="shorten it" if plain else "say less, or begin a new conversation",
    )


@runtime_checkable
class Watch(Protocol):
    """What is shown each step of a text; an exception that it raises ends the text."""

    whole: bool  # whether the first step shows the logits of the prompt's tokens as well

    def __call__(self, logits: Float[Tensor, "s vocab"], token: int) -> None:
        """The last row of `logits` is what the model predicts, and `token` what was chosen."""


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    *,
    before: Sequence[int] = (),
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    rng: torch.Generator | None = None,
    watch: Watch | None = None,
    remedy: str = "shorten it",
) -> "Answer":
    """The text with which the model goes on after tokens, as `generate` has it after a text.

    The text begins as it would after the tokens `before`. Raises what `generate` raises.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {max_new_tokens}: at least 1 is needed")
    if sampling.draws and rng is None:
        raise UsageError("drawing at random needs rng, a torch.Generator on the CPU")
    room = room_after(model, len(ids), remedy)
    stops = stop_tokens(model, tokenizer)
    writer: Any = model  # that it can generate, its type does not say
    whole = watch is not None and watch.whole and writer._supports_logits_to_keep()
    steps: Iterator[int] = writer.generate(
        torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        custom_generate=_steps,
        rng=rng if sampling.draws else None,
        watch=watch,
        max_new_tokens=max_new_tokens if room is None else min(room, max_new_tokens),
        eos_token_id=sorted(stops) or None,
        pad_token_id=0,  # one text is never padded; without it, a warning
        use_cache=True,
        num_beams=1,
        num_return_sequences=1,
        **({"logits_to_keep": 0} if whole else {}),
        **sampling.keywords,
    )
    decoder = IncrementalDecoder(tokenizer, before)
    cut: End = "positions" if room is not None and room < max_new_tokens else "max_new_tokens"
    return Answer(steps, decoder, prompt_tokens=len(ids), stops=stops, cut=cut)


End = Literal["stop", "max_new_tokens", "positions"]


class Answer:
    """A text that is being written: iterating over it computes it, and yields it in pieces.

    A piece is one or more whole characters; only bytes that never become one, as where a limit
    cuts the text, are shown as U+FFFD. Counts, seconds and `text` are those so far; the time that
    the caller spends between two pieces is not in them.
    """

    def __init__(
        self,
        steps: Iterator[int],
        decoder: IncrementalDecoder,
        *,
        prompt_tokens: int,
        stops: frozenset[int],
        cut: End,
    ) -> None:
        self._steps, self._decoder, self._stops, self._cut = steps, decoder, stops, cut
        self.prompt_tokens = prompt_tokens
        self.new_tokens = 0  # with the stop token
        self.prefill_seconds = 0.0  # until the first new token
        self.decode_seconds = 0.0  # of the other new_tokens - 1
        self.text = ""
        self.ended: End | None = None  # by what; None while it goes on, or was interrupted

    def __iter__(self) -> Iterator[str]:
        last = None
        while (token := self._next()) is not None:
            last = token
            if token not in self._stops and (piece := self._decoder.add(token)):
                yield self._say(piece)
        if rest := self._decoder.rest():
            yield self._say(rest)
        self.ended = "stop" if last in self._stops else self._cut

    def _next(self) -> int | None:
        start = time.perf_counter()
        token = next(self._steps, None)  # on the host by now, so a GPU has finished
        seconds = time.perf_counter() - start
        if self.new_tokens == 0:
            self.prefill_seconds = seconds
        else:
            self.decode_seconds += seconds
        self.new_tokens += token is not None
        return token

    def _say(self, piece: str) -> str:
        self.text += piece
        return piece


def _steps(
    model: Any,
    input_ids: Int[Tensor, "1 s"],
    logits_processor: Callable[..., Tensor],
    stopping_criteria: Callable[..., Tensor],
    generation_config: Any,
    rng: torch.Generator | None,
    watch: Watch | None = None,
    **model_kwargs: Any,
) -> Iterator[int]:
    """New tokens, one by one: the loop inside generate(), after its `_sample`, for one text."""
    fresh, step = None, None  # how many of the last tokens the cache lacks: at first all
    while True:
        if step is None:
            inputs = model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=fresh,
                is_first_iteration=fresh is None,
                **model_kwargs,
            )
            with torch.no_grad():  # generate()'s own ended as it returned; the caller's goes on
                out = model(**inputs, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(out, model_kwargs)
            seen, logits = out.logits[0], out.logits[:, -1].float()
        else:
            seen = logits = step(input_ids[:, -1:])
        if not logits.amax().isfinite():  # NaN is the largest; some models rule tokens out by -inf
            raise NonFinite(
                f"{type(model).__name__} computes NaN or infinity in {model.dtype}; "
                "choose another dtype, or repair its weights"
            )
        token = _choose(logits_processor(input_ids, logits), rng).to(input_ids.device)
        input_ids = torch.cat([input_ids, token], dim=1)
        if watch is not None:
            watch(seen, int(token))
        yield int(token)
        if stopping_criteria(input_ids, None).all():
            return
        if fresh is None:
            left = generation_config.max_length - input_ids.shape[1]
            step, fresh = fixed_step(model, out.past_key_values, left), 1
            if step is not None:
                model_kwargs, inputs, out = {}, None, None  # which hold the cache of the prompt


def _choose(scores: Float[Tensor, "1 vocab"], rng: torch.Generator | None) -> Int[Tensor, "1 1"]:
    if rng is None:
        return scores.argmax(-1, keepdim=True)
    # On the CPU, so that a seed gives the same text on every device, up to rounding.
    return torch.multinomial(scores.softmax(-1).cpu(), 1, generator=rng)


def room_after(model: PreTrainedModel, prompt_tokens: int, remedy: str) -> int | None:
    """How many tokens can follow: the last of the model's positions still predicts one.

    None where positions are not limited, as with ALiBi. Raises UsageError where none is left.
    """
    limit = positions(model.config)
    if limit is not None and prompt_tokens > limit:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, above the model's {limit} positions; {remedy}"
        )
    return None if limit is None else limit - prompt_tokens + 1


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text: the ends of the generation_config, and the tokenizer's."""
    generation = model.generation_config
    ends = generation.eos_token_id if generation is not None else None
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(end for end in (*ends, tokenizer.eos_token_id) if end is not None)
