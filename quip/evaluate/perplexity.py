"""Perplexity on windows of consecutive tokens, as GPTQ and QuIP evaluate it."""

import math
from functools import reduce
from operator import add

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from quip.errors import UsageError
from quip.model.finite import finite_predictions, refuse
from quip.model.passed import Passage, ready
from quip.model.stream import Stream
from quip.model.team import ALONE, Team
from quip.model.tune.kl import CHUNK
from quip.model.turns import in_turn, own_batches


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Int[Tensor, "count seqlen"],
    *,
    device: torch.device | str,
    batch_size: int = 1,
    progress: bool = False,
    stream: Stream | None = None,
    team: Team = ALONE,
) -> float:
    """exp of the mean over windows of the mean of -log p(token | the tokens before it in it).

    A window of seqlen tokens gives seqlen - 1 predictions; log p is computed in float32 from
    logits of any dtype. The model is on the device during the evaluation, then back where it
    was; with a stream, block by block, to the same number. Raises NonFinite where it is not finite,
    as when activations overflow float16; the message says in which block they do. In a team each
    process measures its share of the windows, and all return what one would, bit for bit.
    """
    count, seqlen = tokens.shape
    if count == 0 or seqlen < 2:
        raise UsageError(f"{count} windows of {seqlen} tokens; perplexity needs 1 of 2 or more")
    if model.training:
        raise UsageError("the model is in training mode, where dropout is random; call eval()")
    own, sums, total, done = own_batches(tokens, batch_size, team), list[float](), 0.0, 0
    windows = torch.cat(own or [tokens[:1]])  # whoever has none sees one that does not count
    bar = tqdm(total=len(windows), desc="perplexity", unit="window", disable=not progress)
    how = Passage(device=device, batch_size=batch_size, progress=progress)
    with (
        ready(model, windows, how, stream=stream, what="perplexity"),
        finite_predictions(model, "perplexity"),
        bar,
    ):
        for batch in own:
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            sums.append(float(_nll(logits[:, :-1], ids[:, 1:]).sum()))
            total, done = total + sums[-1], done + len(batch)
            bar.update(len(batch))
            bar.set_postfix(perplexity=f"{_exp(total / done):.2f}")
        total = reduce(add, in_turn(sums, team))  # sum() may add in another order
        if math.isinf(found := _exp(total / count)):
            ids = windows[-batch_size:].to(device)
            refuse(model, "perplexity", input_ids=ids, use_cache=False)
    return found


def _nll(logits: Float[Tensor, "b s vocab"], targets: Int[Tensor, "b s"]) -> Float[Tensor, " b"]:
    """The mean over positions of -log softmax(logits)[target], in float64."""
    count, length, vocab = logits.shape
    positions = max(1, CHUNK // (count * vocab))
    total = torch.zeros(count, dtype=torch.float64, device=logits.device)
    for x, y in zip(logits.split(positions, dim=1), targets.split(positions, dim=1), strict=True):
        # In float32: log p of some -10 has a spacing of 0.06 in bfloat16.
        nll = cross_entropy(x.flatten(0, 1).float(), y.flatten(), reduction="none")
        total += nll.view(y.shape).double().sum(dim=1)
    return total / length


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
