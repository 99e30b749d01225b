"""Second moments of the experts of a mixture, summed up only when a matrix's turn comes.

A block's experts have far more inputs than there is room for their moments: 256 experts of
DeepSeek-V3 would take 105 GB. So the inputs X of all experts together are kept instead, which are
no more than the hidden states, with the experts that the router chose for each token; then

    H_e = X_e^T X_e / c_e,    X_e = the c_e rows of X that the router sent to expert e,

and for its second matrix the same of what its first makes of X_e. An expert that saw fewer tokens
than its matrix has inputs, n, has moments without full rank. It takes the missing ones from what
it would see on all tokens of the layer,

    H = (c_e H_e + (n - c_e) H_pool) / n,

so that an expert which no token reached is calibrated on all of them.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from quip.errors import NonFinite, UnsupportedModel
from quip.matrix.hessian import CHUNK, Hessian, Observed, anchors_of, squares, weighed
from quip.model.sensitivity.found import Sent
from quip.model.team import ALONE, Team
from quip.packed.experts import Experts

Part = TypeVar("Part", bound=nn.Module)
Tokens: TypeAlias = tuple[Tensor, Tensor | None]  # x [tokens, n], and the roots of their weights
log = logging.getLogger(__name__)


class Routed:
    """What one module of experts was handed on all calibration tokens, batch by batch.

    It lives where the hidden states do. The experts are remembered as they are: what is replaced
    in the model later computes nothing here. In a team, batches are those of this process, and
    counts and sums those of all. `weights` are those of its tokens; None: all are 1.
    """

    def __init__(
        self,
        name: str,
        experts: Experts,
        *,
        home: torch.device,
        team: Team = ALONE,
        weights: Sent | None = None,
    ) -> None:
        self.name, self.experts, self._home = name, _as_it_is(experts), home
        self._team, self.weights = team, weights
        self._units: list[tuple[Tensor, Tensor]] = []  # of each batch X and the chosen experts
        self._device = home

    def has_any(self, names: Iterable[str]) -> bool:
        """Whether any of these matrices is of these experts."""
        return any(name.startswith(f"{self.name}.") for name in names)

    def see(self, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        """A forward pre-hook of the experts."""
        hidden, index, _ = self.experts.routed(*args, *kwargs.values())
        self._device = hidden.device
        # Copies also at home: a block may go on to change what it handed over.
        self._units.append((hidden.to(self._home, copy=True), index.to(self._home, copy=True)))

    def weighing(self, weights: Sent | None) -> "Routed":
        """Experts and what they were handed, with such weights of tokens."""
        found = Routed(self.name, self.experts, home=self._home, team=self._team, weights=weights)
        found._units, found._device = self._units, self._device
        return found

    @cached_property
    def counts(self) -> list[int]:
        """Tokens that the router sent to each expert."""
        chosen = torch.cat([index.flatten() for _, index in self._units])
        found = torch.bincount(chosen, minlength=len(self.experts))[: len(self.experts)]
        return self._team.sum(found).tolist()

    def tokens(self, expert: int | None, part: str) -> Iterator[Tokens]:
        """The rows of X of an expert (None: all), on the device, in the order of the batches.

        With the roots of their weights at a matrix of the expert.
        """
        before = 0
        for hidden, index in self._units:
            rows = torch.arange(len(hidden), device=hidden.device)
            if expert is not None:
                rows = rows[(index == expert).any(-1)]
            for own in rows.split(CHUNK) if len(rows) else ():
                x, roots = hidden[own].to(self._device), None
                if self.weights is not None:
                    roots = self.weights.roots(part, expert, own + before).to(self._device)
                yield x, roots
            before += len(hidden)

    @cached_property
    def pool(self) -> Hessian:
        """The moments of X, which are held: every expert's first matrix would see them."""
        n, first = self._units[0][0].shape[-1], next(iter(self.experts[0]))
        return self.sum(lambda: self.tokens(None, first), n, self.name)

    def sum(self, inputs: Callable[[], Iterator[Tokens]], n: int, name: str) -> Hessian:
        """The moments of these inputs, which can be gone through more than once.

        First for the largest sum of squares, which the anchors of exact sums are chosen by. Raises
        NonFinite, with the name of the matrix, where inputs are NaN or infinite.
        """
        anchors, team = None, self._team
        if team.exact:
            largest, chunks = torch.zeros(n, dtype=torch.float64, device=self._device), 0
            for x, roots in inputs():
                largest, chunks = largest.maximum(squares(weighed(x, roots))), chunks + 1
            most = int(team.sum(torch.tensor(chunks)))
            anchors = anchors_of(team.largest(largest), most)
        found = Hessian(n, anchors=anchors, exact=team.exact, device=self._device)
        for x, roots in inputs():
            found.update(x, roots)
        team.total(found)
        if not found.is_finite:
            raise NonFinite(
                f"{name}: NaN or infinity among its inputs on the calibration tokens; "
                "load the model as float32, or check its weights"
            )
        return found

    def hessians(self, *, all_experts: bool) -> dict[str, "RoutedHessian"]:
        """The moments of each expert's matrices, by full dotted name.

        Raises UnsupportedModel where the experts never ran.
        """
        if not self._units:
            raise UnsupportedModel(f"{self.name} never ran: its experts are used in another way")
        return {
            f"{self.name}.{expert}.{part}": RoutedHessian(self, expert, part, all_experts)
            for expert in range(len(self.experts))
            for part, _ in self.experts[expert].named_children()
        }


class RoutedHessian:
    """The second moments of the inputs of one expert's matrix, summed up each time they are asked.

    Tokens are those that the router sent, filled up to as many as there are inputs; with
    `all_experts`, all tokens of the layer.
    """

    def __init__(self, routed: Routed, expert: int, part: str, all_experts: bool) -> None:
        self.routed, self._expert, self._part, self._all = routed, expert, part, all_experts
        self.name = f"{routed.name}.{expert}.{part}"
        self.inputs = routed.experts[expert].get_submodule(part).in_features

    @property
    def count(self) -> int:
        """Tokens that the router sent to the expert."""
        return self.routed.counts[self._expert]

    @property
    def is_short(self) -> bool:
        """Whether these, if it is they that count, are fewer than the inputs of the matrix."""
        return self.count < self.inputs and not self._all

    @torch.no_grad()
    def summed(self) -> Hessian:
        """The moments, on the device of the block."""
        if self._all or not self.count:
            return self._pool()
        own = self.routed.sum(lambda: self._inputs(self._expert), self.inputs, self.name)
        return own.filled(self._pool()) if self.is_short else own

    def _pool(self) -> Hessian:
        """What the matrix would see on all tokens of the layer."""
        if self._part != "down_proj":
            return copy.copy(self.routed.pool)  # whose sums others will ask for
        return self.routed.sum(lambda: self._inputs(None), self.inputs, self.name)

    def _inputs(self, of: int | None) -> Iterator[Tokens]:
        for x, roots in self.routed.tokens(of, self._part):
            second = self._part == "down_proj"
            yield self.routed.experts.between(self._expert, x) if second else x, roots


def same_experts(one: Observed, other: Observed) -> bool:
    """Whether two inputs are of the experts of one layer."""
    routed = [x.routed for x in (one, other) if isinstance(x, RoutedHessian)]
    return len(routed) == 2 and routed[0] is routed[1]


def tell_of_few(block: str, hessians: Mapping[str, Observed]) -> None:
    """Warn of a block's experts that saw fewer tokens than their matrices have inputs."""
    routed = [x for x in hessians.values() if isinstance(x, RoutedHessian)]
    short = [x for x in routed if x.is_short]
    if short:
        log.warning(
            "%s: %d of the %d matrices of its experts saw fewer tokens than they have inputs (%d "
            "none at all), and take the others from all tokens of the layer; more samples help",
            *(block, len(short), len(routed), sum(not x.count for x in short)),
        )


def _as_it_is(module: Part) -> Part:
    """A module of the same parameters, which keeps its parts when the other's are replaced."""
    found = copy.copy(module)
    parts = {name: part and _as_it_is(part) for name, part in module._modules.items()}
    found._modules = parts
    return found
