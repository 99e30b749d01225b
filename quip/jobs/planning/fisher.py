"""Damages from one pass forward and back: what each width is expected to cost, unrounded.

With M = E[|g_t|^2 x_t x_t^T] of a matrix (quip/model/sensitivity), rounding it costs about

    1/2 (1/m) tr(E M E^T)  ~  1/2 (1/m) D(b) |W~|^2 / n  sum_k d_k

nats per token: after a rotation weights are as good as Gaussian, LDLQ leaves an error of D(b)
times their variance in each column, and column k costs d_k, of M~ = (I + U) diag(d) (I + U)^T.
D(b) is the squared error of Gaussian weights, which is measured.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from quip.jobs.alike import check_inputs
from quip.jobs.calibration import calibration_of
from quip.jobs.planning.asked import Planning
from quip.jobs.planning.choices import Group
from quip.matrix.hessian import sharing
from quip.matrix.prepare import Factorisations
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.model.deal import Deal, rounds
from quip.model.load import LoadedModel, load_model
from quip.model.matrices import find_blocks
from quip.model.sensitivity.found import Sensitivity
from quip.model.sensitivity.gather import measure_sensitivity, share
from quip.model.sensitivity.measure import Passing
from quip.model.states import batch_size_for
from quip.model.team import Team
from quip.model.walk import walk
from quip.transforms import Chain, Hadamard, OutputRescale


def fisher_damages(
    asked: Planning, groups: Sequence[Group], device: torch.device, team: Team
) -> list[list[float]]:
    """The expected KL of each choice of each group, in nats per token."""
    assert asked.dataset is not None
    loaded = load_model(asked.model, dtype=asked.dtype, seqlen=asked.seqlen, stream=asked.stream)
    tokens = calibration_of(
        loaded, asked.dataset, nsamples=asked.nsamples, seqlen=asked.seqlen, seed=asked.seed
    )
    check_inputs(team, {"model": loaded}, calibration=tokens.stamp)
    batch_size = batch_size_for(tokens.seqlen, loaded.model, device)
    team.check(len(tokens.ids), batch_size)
    how = Passing(
        kind="fisher",
        seed=asked.seed,
        device=device,
        batch_size=batch_size,
        team=team,
        stream=loaded.stream,
    )
    felt = share(measure_sensitivity(loaded.model, tokens.ids, how), team, batch_size)
    assert felt is not None
    recipes = {name: group.choices[0].recipe for group in groups for name in group.names}
    own = dict(_costs(loaded, tokens.ids, recipes, felt, how))
    costs = {name: cost for each in team.hear(own) for name, cost in each.items()}
    return [
        [choice.mse * sum(costs[name] for name in group.names) for choice in group.choices]
        for group in groups
    ]


def _costs(
    loaded: LoadedModel,
    tokens: Tensor,
    recipes: Mapping[str, Recipe],
    felt: Sensitivity,
    how: Passing,
) -> Iterator[tuple[str, float]]:
    """The matrices dealt to this process: nats per unit of squared error of Gaussian weights."""
    blocks = walk(
        loaded.model,
        how.team.share(tokens, how.batch_size),
        device=how.device,
        batch_size=how.batch_size,
        team=how.team,
        stream=loaded.stream,
    )
    # disable=None: a bar on a terminal only.
    bar = tqdm(blocks, total=len(find_blocks(loaded.model)[1]), unit="block", disable=None)
    for block in bar:
        (hessians,), matrices = block.observe_each([felt]), block.matrices()
        for together in rounds(list(sharing(hessians)), hessians, how.team, one_by_one=False):
            sums = Deal.of(block, together, recipes, how.team).totals(hessians)
            for names in together:
                if names[0] not in sums:
                    continue
                H = sums.pop(names[0]).take()
                for name in names:
                    W = matrices[name].weight.detach()
                    f = felt.sums[f"outputs {name}"].to(W.device)
                    yield name, expected_cost(W, H, f, recipes[name], name=name, seed=how.seed)


def expected_cost(
    W: Float[Tensor, "m n"],
    H: Float[Tensor, "n n"],
    f: Float[Tensor, " m"],
    recipe: Recipe,
    *,
    name: str,
    seed: int,
) -> float:
    """1/2 |W~|^2 / (m n) sum_k d_k  sum_i f_i r_i^2 / tr H, the nats that D = 1 would cost.

    H is of any scale, for f_i = E[|x|^2 g_i^2] has that of M: tr M = sum_i f_i. r are the factors
    by which the recipe rescales outputs, 1 for all others.
    """
    (m, n), trace = W.shape, float(H.trace())
    if trace == 0:  # inputs that are always 0
        return 0.0
    T, W_t, factored = Factorisations(H).of(W, recipe.sized(m, n), rng_for(seed, name), name, f)
    felt = float((f.double() * _factors(T, m).to(f.device) ** 2).sum()) / trace
    return 0.5 * felt * float(W_t.double().square().sum() / (m * n) * factored.h.double().sum())


def _factors(T: Chain, m: int) -> Float[Tensor, " m"]:
    """What each output of the rotation is multiplied with, but for its sign."""
    r = torch.ones(m, dtype=torch.float64)
    for link in T.links:
        if isinstance(link, OutputRescale):
            r = r * link.r.double().cpu()
        if isinstance(link, Hadamard):
            r = r * link.signs_out.double().cpu()
    return r
