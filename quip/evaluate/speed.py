"""Tokens per second of a model that writes one text: its prompt at once, then token by token."""

import inspect
import time
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from quip.errors import UnsupportedModel, UsageError
from quip.evaluate.memory import measured, module_bytes
from quip.model.device import placed
from quip.model.finite import predicts, refuse


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over the repeats, of one sequence at a time."""

    prefill_tokens_per_second: float  # prompt_tokens / time to the first new token
    decode_tokens_per_second: float  # (new_tokens - 1) / time of the others
    prompt_tokens: int
    new_tokens: int
    repeats: int
    model_bytes: int  # parameters and buffers
    peak_bytes: int  # while it ran: of tensors on CUDA, of the whole process on the CPU
    peak_since_process_start: bool  # the system allows no reset: the peak may be older


@torch.no_grad()
def speed(
    model: PreTrainedModel,
    *,
    device: torch.device | str,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 3,
    seed: int = 0,
) -> Speed:
    """Greedy decoding of random tokens with a key-value cache, timed after one warm-up.

    What generate() adds around the model is left out; its tokens are the same, except that
    nothing ends the text early. The model is on the device meanwhile, then back where it was.
    Raises NonFinite for a model that predicts nothing, whose tokens would be timed in vain.
    """
    _check(model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    rng = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocab, (1, prompt_tokens), generator=rng).to(device)
    with placed(model, device), measured(device) as memory:
        _decode(model, prompt, new_tokens=new_tokens)
        runs = [_decode(model, prompt, new_tokens=new_tokens) for _ in range(repeats)]
    return Speed(
        prefill_tokens_per_second=prompt_tokens / median(prefill for _, prefill, _ in runs),
        decode_tokens_per_second=(new_tokens - 1) / median(decode for _, _, decode in runs),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        model_bytes=module_bytes(model),
        peak_bytes=memory.peak_bytes,
        peak_since_process_start=memory.since_process_start,
    )


def _check(model: PreTrainedModel, *, prompt_tokens: int, new_tokens: int, repeats: int) -> None:
    # The first new token comes with the prompt: a time per token needs a second one.
    least = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2)}
    for name, (value, low) in (least | {"repeats": (repeats, 1)}).items():
        if value < low:
            raise UsageError(f"{name} is {value}; it must be at least {low}")
    if model.training:
        raise UsageError("the model is in training mode, where dropout is random; call eval()")
    # None where positions are not limited, as with ALiBi.
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the model's "
            f"{limit} positions; ask for fewer"
        )


def _decode(
    model: PreTrainedModel, prompt: Int[Tensor, "1 s"], *, new_tokens: int
) -> tuple[Int[Tensor, "1 new"], float, float]:
    """The likeliest tokens, one by one; seconds until the first one, and of the others."""
    # Of the prompt only the last position's logits, where the model can leave out the others.
    selective = "logits_to_keep" in inspect.signature(model.forward).parameters
    start = _now(prompt.device)
    out = model(input_ids=prompt, use_cache=True, **({"logits_to_keep": 1} if selective else {}))
    if getattr(out, "past_key_values", None) is None:
        raise UnsupportedModel(f"{type(model).__name__}: it returns no key-value cache")
    tokens = [out.logits[:, -1:].argmax(-1)]
    first = _now(prompt.device)
    for _ in range(new_tokens - 1):
        out = model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
        tokens.append(out.logits[:, -1:].argmax(-1))
    end = _now(prompt.device)
    if not predicts(out.logits):  # what is NaN in the cache stays, so the last token tells
        refuse(model, "what is decoded for its speed", input_ids=prompt, use_cache=False)
    return torch.cat(tokens, dim=1), first - start, end - first


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run on after their calls have returned
    return time.perf_counter()
