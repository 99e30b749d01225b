"""How long two models write the same: greedy texts from the same prompts, token by token.

A small change of the likeliest token's neighbours moves perplexity little, but once a text has
taken another turn it goes on from there: generation feels what perplexity hides.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from quip.errors import UnsupportedModel, UsageError
from quip.model.device import placed
from quip.model.finite import predicts, refuse
from quip.model.team import ALONE, Team
from quip.model.turns import own_batches, rows_in_turn
from quip.packed.checkpoint import positions
from quip.packed.step import fixed_step


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far greedy texts of a model are those of the original, up to their first difference."""

    prefix: float  # mean number of tokens before the first difference, over new_tokens
    whole: float  # share of texts without a difference
    prompts: int
    prompt_tokens: int  # of each
    new_tokens: int  # that each text goes on with


@torch.no_grad()
def agreement(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Int[Tensor, "count length"],
    *,
    new_tokens: int = 32,
    device: torch.device | str,
    batch_size: int = 16,
    progress: bool = False,
    team: Team = ALONE,
) -> Agreement:
    """Both models go on with each prompt, by the likeliest token each time, and are compared.

    Nothing ends a text early, as an end token would. Both decode with a cache, `batch_size` texts
    side by side, one model after the other on the device, then back where they were. Raises
    UsageError for prompts and new tokens beyond the positions of either, NonFinite where one
    predicts nothing. In a team each process takes its share of the prompts, and all return what
    one alone would.
    """
    count, length = prompts.shape
    if min(count, length, new_tokens) < 1:
        raise UsageError(
            f"{count} prompts of {length} tokens and {new_tokens} new ones; agreement needs 1 each"
        )
    for name, one in (("model", model), ("reference", reference)):
        _check(one, name, length + new_tokens)
    own = own_batches(prompts, batch_size, team)
    bar = tqdm(total=2 * sum(map(len, own)), desc="agreement", unit="text", disable=not progress)
    with bar:
        with placed(reference, device):
            texts = []
            for batch in own:
                texts.append(torch.cat([*_greedy(reference, batch.to(device), new_tokens)], dim=1))
                bar.update(len(batch))
        equal = torch.zeros(0, dtype=torch.int64)
        with placed(model, device):
            for batch, text in zip(own, texts, strict=True):
                equal = torch.cat([equal, _equal_tokens(model, batch.to(device), text).cpu()])
                bar.update(len(batch))
    equal = rows_in_turn(equal, batch_size, team)
    return Agreement(
        prefix=float(equal.double().mean()) / new_tokens,
        whole=float((equal == new_tokens).double().mean()),
        prompts=count,
        prompt_tokens=length,
        new_tokens=new_tokens,
    )


def prompts_from(
    tokens: Int[Tensor, "windows seqlen"], *, count: int, length: int
) -> Int[Tensor, "count length"]:
    """So many prompts, spread evenly over the pieces that windows can be cut into.

    Raises UsageError where the windows have fewer pieces of that length.
    """
    pieces = tokens.unfold(1, length, length).flatten(0, 1)
    if count > len(pieces):
        raise UsageError(
            f"{tokens.shape[0]} windows of {tokens.shape[1]} tokens make {len(pieces)} prompts of "
            f"{length}, and {count} are asked for; ask for fewer, or measure more windows"
        )
    return pieces[torch.arange(count) * len(pieces) // count]


def _check(model: PreTrainedModel, name: str, length: int) -> None:
    if model.training:
        raise UsageError(f"the {name} is in training mode, where dropout is random; call eval()")
    limit = positions(model.config)
    if limit is not None and length > limit:
        raise UsageError(
            f"a prompt and its text of {length} tokens exceed the {limit} positions of the {name}; "
            "ask for fewer"
        )


def _equal_tokens(
    model: PreTrainedModel, prompts: Int[Tensor, "b length"], text: Int[Tensor, "b new"]
) -> Int[Tensor, " b"]:
    """How many tokens of its text for each prompt the model writes before another one."""
    going = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    equal = torch.zeros(len(prompts), dtype=torch.int64, device=prompts.device)
    for column, tokens in enumerate(_greedy(model, prompts, text.shape[1])):
        going &= tokens[:, 0] == text[:, column]
        equal += going
        if not going.any():
            break  # what comes after a difference is not asked for
    return equal


def _greedy(
    model: PreTrainedModel, prompts: Int[Tensor, "b length"], new_tokens: int
) -> Iterator[Int[Tensor, "b 1"]]:
    """The likeliest token of each text, and of each text with that one, so many times."""
    # Of the prompt only the last position's logits, where the model can leave out the others.
    selective = "logits_to_keep" in inspect.signature(model.forward).parameters
    out = model(input_ids=prompts, use_cache=True, **({"logits_to_keep": 1} if selective else {}))
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise UnsupportedModel(f"{type(model).__name__}: it returns no key-value cache")
    logits, step = out.logits[:, -1], fixed_step(model, cache, new_tokens - 1)
    for left in reversed(range(new_tokens)):
        if not predicts(logits):
            refuse(model, "a greedy text", input_ids=prompts, use_cache=False)
        yield (tokens := logits.argmax(-1, keepdim=True))
        if left == 0:
            return
        if step is None:
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1]
        else:
            logits = step(tokens)
