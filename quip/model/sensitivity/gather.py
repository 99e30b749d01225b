"""What the processes of a team have felt, put together; and what one of them needs, handed out."""

import logging
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from quip.errors import NonFinite
from quip.model.sensitivity.felt import Felt
from quip.model.sensitivity.found import Sensitivity
from quip.model.sensitivity.measure import Passing, felt_by
from quip.model.team import Team

log = logging.getLogger(__name__)


def measure_sensitivity(
    model: nn.Module, tokens: Int[Tensor, "count seqlen"], how: Passing
) -> Sensitivity | None:
    """What the loss of the model feels on these windows, at the first process of a team.

    The others, which do their share of them, get None. Raises as `felt_by`, and NonFinite, naming
    the matrix, where gradients are NaN or infinite.
    """
    felt, team = felt_by(model, tokens, how), how.team
    sums = _of_all(felt, tokens.numel(), team)
    own, whole = _windows(felt), {}
    for key in _common(own, len(team.share(tokens, how.batch_size)), team):
        gathered = team.gather(own.pop(key), how.batch_size)
        if gathered is not None:
            whole[key] = gathered
    if not team.leads:
        return None
    return Sensitivity(kind=how.kind, windows=whole, sums=sums | _means(whole, felt))


def share(found: Sensitivity | None, team: Team, batch_size: int) -> Sensitivity | None:
    """What the first process knows, at each of a team: of windows, the share of each.

    None, where it knows nothing.
    """
    if team.size == 1:
        return found
    windows, sums = (found.windows, found.sums) if found else ({}, {})
    known = found and [found.kind, list(windows)]
    known, sums = team.spread(known, sums, 0)
    if known is None:
        return None
    own = {}
    for key in known[1]:
        part = team.scatter(windows.get(key), batch_size)
        assert part is not None
        own[key] = part
    return Sensitivity(kind=known[0], windows=own, sums=sums)


def _of_all(felt: Sequence[Felt], tokens: int, team: Team) -> dict[str, Float64[Tensor, "..."]]:
    """The means of what each matrix felt over so many tokens, units added up in their order."""
    found = {}
    for block in felt:
        for what, sums in (("outputs", block.outputs), ("squares", block.squares)):
            for name, parts in sums.items():
                total = _in_order(parts, team)
                if not total.isfinite().all():
                    raise NonFinite(
                        f"{name}: NaN or infinity in the gradient of the loss at its outputs; load "
                        "the model as float32 or bfloat16, or leave out --token_weights"
                    )
                found[f"{what} {name}"] = total / tokens
    return found


def _in_order(parts: Sequence[Tensor], team: Team) -> Tensor:
    """The sum of what units have, which are dealt to the processes in turn."""
    if team.size == 1:
        return parts[0]
    heard = [team.spread(None, {"": torch.stack([*parts])}, of)[1][""] for of in range(team.size)]
    total = torch.zeros_like(heard[0][0])
    for unit in range(len(heard[0])):
        for own in heard:
            if unit < len(own):
                total = total + own[unit]
    return total


def _windows(felt: Sequence[Felt]) -> dict[str, Tensor]:
    """What was felt of the windows of this process, by the keys of `Sensitivity`."""
    return {
        f"{what} {name}": torch.cat(parts)
        for block in felt
        for what, found in (("tokens", block.tokens), ("sent", block.sent), ("slots", block.slots))
        for name, parts in found.items()
    }


def _common(own: Mapping[str, Tensor], count: int, team: Team) -> list[str]:
    """The keys of what is known of every window by all processes, of which this has `count`."""
    complete = [key for key, x in own.items() if len(x) == count]
    heard = team.hear([complete, list(own)])
    common = [key for key in heard[0][0] if all(key in theirs for theirs, _ in heard)]
    for key in dict.fromkeys(key for _, theirs in heard for key in theirs):
        if key not in common:
            log.warning("%s: not one row for each token, so all of them weigh the same", key)
    return common


def _means(whole: Mapping[str, Tensor], felt: Sequence[Felt]) -> dict[str, Float64[Tensor, "..."]]:
    """The mean weight of the tokens of each input, and of those that were sent to each expert."""
    found, experts = {}, {name: count for block in felt for name, count in block.experts.items()}
    for key, s in whole.items():
        what, _, name = key.partition(" ")
        if what == "tokens":
            found[f"means {name}"] = s.mean(dtype=torch.float64)
        if what == "slots":
            owner = name.rpartition(".")[0]
            sent, count = whole[f"sent {owner}"].flatten().long(), experts[owner]
            total = torch.bincount(sent, s.flatten().double(), minlength=count)
            of_experts = total / torch.bincount(sent, minlength=count).clamp_min(1)
            of_tokens = s.sum(-1, dtype=torch.float64).mean()
            found[f"means {name}"] = torch.cat([of_experts, of_tokens[None]])
    return found
