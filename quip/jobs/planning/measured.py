"""Damages by swapping: what the predictions gain when one group comes from a wider checkpoint.

exllamav3 optimises its mixtures so. It sees how errors act together where the model will be, which
no second moment does, and costs one evaluation a group.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from quip.errors import UsageError
from quip.evaluate.divergence import kl_of_positions
from quip.jobs.alike import check_inputs
from quip.jobs.calibration import calibration_of
from quip.jobs.planning.asked import Planning
from quip.jobs.planning.choices import Group
from quip.model.device import placed
from quip.model.finite import finite_predictions
from quip.model.load import load_model
from quip.model.team import ALONE, Team
from quip.model.turns import in_turn
from quip.packed.checkpoint import to_dense
from quip.packed.linear import QuantizedLinear
from quip.packed.stack import StackedLinear

log = logging.getLogger(__name__)


def measured_damages(
    asked: Planning, groups: Sequence[Group], device: torch.device, team: Team
) -> list[list[float]]:
    """a_g D(b) of each group and choice, in nats per token.

    a_g = (KL of the narrow checkpoint - KL with the group from the wide one) / (D(narrow) -
    D(wide)), where D is the squared error of Gaussian weights, or 0 where nothing is gained. All
    three models are in memory, and dense.
    """
    assert asked.dataset is not None
    loaded = load_model(asked.model, dtype=asked.dtype, seqlen=asked.seqlen)
    narrow, wide = (_quantized(name, loaded.dtype_name, groups) for name in asked.checkpoints)
    errors = list(zip(narrow[1], wide[1], strict=True))
    if any(before <= after for before, after in errors):
        raise UsageError(
            f"--checkpoints {','.join(asked.checkpoints)}: every matrix of the second has to have "
            "more bits than in the first; name the narrow one first"
        )
    tokens = calibration_of(
        loaded, asked.dataset, nsamples=asked.nsamples, seqlen=asked.seqlen, seed=asked.seed
    )
    check_inputs(team, {"model": loaded}, calibration=tokens.stamp)
    team.check(len(tokens.ids), 1)
    models = loaded.model, narrow[0], wide[0]
    start, gains = swapped_gains(*models, groups, tokens.ids, device, team)
    log.info("KL %.4f nats per token of %s", start, asked.checkpoints[0])
    found = []
    for group, gain, (before, after) in zip(groups, gains, errors, strict=True):
        a = max(gain, 0.0) / (before - after)
        found.append([a * choice.mse for choice in group.choices])
    return found


@torch.no_grad()
def swapped_gains(
    reference: nn.Module,
    narrow: nn.Module,
    wide: nn.Module,
    groups: Sequence[Group],
    tokens: Int[Tensor, "count seqlen"],
    device: torch.device,
    team: Team = ALONE,
) -> tuple[float, list[float]]:
    """The mean KL of a dense model, and by how much each group lowers it when it is another's.

    Windows are dealt to the processes of a team; the means are of all.
    """
    own, kls = team.share(tokens, 1), list[list[float]]()
    # disable=None: a bar on a terminal only.
    bar = tqdm(total=len(own) * len(groups), desc="swaps", unit="group", disable=None)
    with (
        bar,
        placed(reference, device),
        placed(narrow, device),
        placed(wide, device),
        finite_predictions(narrow, "a swap"),
    ):
        for window in own:
            ids = window[None].to(device)
            p = reference(input_ids=ids, use_cache=False).logits[:, :-1]

            def moved() -> float:
                q = narrow(input_ids=ids, use_cache=False).logits[:, :-1]  # noqa: B023
                return float(kl_of_positions(p, q).mean())  # noqa: B023

            kls.append([moved()])
            for group in groups:
                with _swapped(narrow, wide, group.names):
                    kls[-1].append(moved())
                bar.update()
    before, *after = map(fmean, zip(*in_turn(kls, team), strict=True))
    return before, [before - kl for kl in after]


@contextmanager
def _swapped(one: nn.Module, other: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, the weights of these matrices are the other model's."""
    pairs = [
        [m.get_submodule(name).get_parameter("weight") for m in (one, other)] for name in names
    ]

    def exchange() -> None:
        for mine, theirs in pairs:
            mine.data, theirs.data = theirs.data, mine.data

    exchange()
    try:
        yield
    finally:
        exchange()


def _quantized(name: str, dtype: str, groups: Sequence[Group]) -> tuple[nn.Module, list[float]]:
    """The model of a checkpoint, made dense, and the squared error D of each group there."""
    model = load_model(name, dtype=dtype).model
    errors = []
    for group in groups:
        width = _width(model, group.names[0], name)
        known = {choice.width: choice.mse for choice in group.choices}
        if width not in known:
            raise UsageError(
                f"--checkpoints {name}: {group.names[0]} has {width:g} bits there, and --choices "
                f"are {', '.join(f'{one:g}' for one in known)}; add it to these"
            )
        errors.append(known[width])
    return to_dense(model), errors


def _width(model: nn.Module, matrix: str, name: str) -> float:
    """Bits of the codes of a weight, to the nearest half."""
    modules = dict(model.named_modules())
    layer = modules.get(matrix)
    whole = layer.whole if isinstance(layer, StackedLinear) else layer
    if not isinstance(whole, QuantizedLinear):
        raise UsageError(
            f"--checkpoints {name}: it has no quantized {matrix}; name two checkpoints of the "
            "model that `quip run --save` wrote"
        )
    bits = 8 * whole.codes.nbytes / (whole.in_features * whole.out_features)
    return round(2 * bits) / 2
