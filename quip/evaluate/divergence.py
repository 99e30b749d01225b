"""How far a model's predictions moved: the divergence of two models on the same tokens.

Perplexity asks how well a model predicts the text. This asks whether it still predicts what the
original does, at every token of the vocabulary: errors that cancel in perplexity add up here.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn
from tqdm import tqdm

from quip.errors import UsageError
from quip.model.finite import finite_predictions, refuse
from quip.model.passed import Passage, ready
from quip.model.stream import Stream
from quip.model.team import ALONE, Team
from quip.model.tune.kl import CHUNK, kl_terms
from quip.model.turns import own_batches, rows_in_turn


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(p_reference || p_model) = sum_v p_reference(v) log(p_reference(v) / p_model(v)), in nats.

    Every value is finite, but for the standard error of a single window, which is NaN.
    """

    kl: float  # mean over positions: the cost, in nats per token
    kl_std_error: float  # of that mean, over windows; positions of one are not independent
    kl_p99: float  # the least KL that 99% of positions do not exceed: rare but large changes
    top1_agreement: float  # share of positions with the same likeliest token: greedy decoding


@torch.no_grad()
def divergence(
    model: nn.Module,
    reference: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    *,
    device: torch.device | str,
    batch_size: int = 1,
    progress: bool = False,
    stream: Stream | None = None,
    reference_stream: Stream | None = None,
    team: Team = ALONE,
) -> Divergence:
    """KL(p_reference || p_model) of the next token, over the seqlen - 1 positions of each window.

    Both models are on the device during the evaluation, then back where they were; one that has a
    stream goes block by block, to the same numbers. Of a single window the standard error is NaN.
    KL is not clamped at zero: rounding leaves some 1e-7 of either sign, which cancels in the mean,
    where a clamp would add it up.

    Raises NonFinite where the KL of a position is not finite: activations overflow, or the model
    alone excludes a token. In a team each process measures its share of the windows, and all
    return what one alone would, bit for bit.
    """
    _check(model, reference, tokens)
    own = own_batches(tokens, batch_size, team)
    windows = torch.cat(own or [tokens[:1]])  # whoever has none sees one that does not count
    count, seqlen = sum(map(len, own)), tokens.shape[1]
    kl = torch.empty(count, seqlen - 1, dtype=torch.float64)
    same = torch.empty(count, seqlen - 1, dtype=torch.bool)
    done, bar = 0, tqdm(total=count, desc="divergence", unit="window", disable=not progress)
    how = Passage(device=device, batch_size=batch_size, progress=progress)
    both = "KL divergence", "KL divergence, of the reference,"
    with (
        ready(model, windows, how, stream=stream, what=both[0]),
        ready(reference, windows, how, stream=reference_stream, what=both[1]),
        finite_predictions(model, both[0]),
        finite_predictions(reference, both[1]),
        bar,
    ):
        for batch in own:
            ids, rows = batch.to(device), slice(done, done + len(batch))
            p = reference(input_ids=ids, use_cache=False).logits[:, :-1]
            q = model(input_ids=ids, use_cache=False).logits[:, :-1]
            _check_vocabularies(q.shape[-1], p.shape[-1])
            kl[rows] = kl_of_positions(p, q).cpu()
            if not kl[rows].isfinite().all():
                refuse(model, "KL divergence", input_ids=ids, use_cache=False)
            same[rows] = (p.argmax(-1) == q.argmax(-1)).cpu()
            done += len(batch)
            bar.update(len(batch))
            bar.set_postfix(kl=f"{float(kl[:done].mean()):.4g}")
    kl, same = (rows_in_turn(rows, batch_size, team) for rows in (kl, same))
    return _summary(kl, same)


def _check(model: nn.Module, reference: nn.Module, tokens: Int[Tensor, "count seqlen"]) -> None:
    count, seqlen = tokens.shape
    if count == 0 or seqlen < 2:
        raise UsageError(f"{count} windows of {seqlen} tokens; divergence needs 1 of 2 or more")
    for name, module in (("model", model), ("reference", reference)):
        if module.training:
            raise UsageError(
                f"the {name} is in training mode, where dropout is random; call eval()"
            )


def _check_vocabularies(model: int, reference: int) -> None:
    if model != reference:
        raise UsageError(
            f"the model has logits for {model} tokens, the reference for {reference}; "
            "divergence needs one vocabulary, padded alike"
        )


def kl_of_positions(
    p_logits: Float[Tensor, "b s vocab"], q_logits: Float[Tensor, "b s vocab"]
) -> Float64[Tensor, "b s"]:
    """sum_v p(v) (log p(v) - log q(v)), in chunks of positions; the sums in float64."""
    count, _, vocab = p_logits.shape
    positions = max(1, CHUNK // (count * vocab))
    found = []
    for x, y in zip(p_logits.split(positions, 1), q_logits.split(positions, 1), strict=True):
        found.append(kl_terms(x, y).sum(-1, dtype=torch.float64))
    return torch.cat(found, dim=1)


def _summary(
    kl: Float64[Tensor, "count positions"], same: Bool[Tensor, "count positions"]
) -> Divergence:
    windows = kl.mean(dim=1)
    # One window says nothing about how windows differ.
    error = float(windows.std()) / math.sqrt(len(windows)) if len(windows) > 1 else math.nan
    return Divergence(
        kl=float(windows.mean()),
        kl_std_error=error,
        # torch.quantile refuses more than 16 million values.
        kl_p99=float(np.quantile(kl.numpy(), 0.99, method="inverted_cdf")),
        top1_agreement=float(same.double().mean()),
    )
