"""One Hessian for each distinct input of a block's matrices, of which a team sees a share each."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quip.errors import NonFinite, UnsupportedModel
from quip.matrix.hessian import Hessian, anchors_of, outgrown
from quip.model.inputs import Inputs
from quip.model.matrices import Matrix
from quip.model.sensitivity.found import Sensitivity
from quip.model.team import ALONE, Team

log = logging.getLogger(__name__)


class Outgrown(Exception):
    """Sums became too large for their anchors; with those that are known now they will not."""


class Observer:
    """One Hessian per distinct input tensor (quip.model.inputs), whichever matrices it feeds.

    The anchors of sums (quip.matrix.hessian) are those of the very first batch, which the first
    process of a team runs. The others keep the inputs of their first until they know the anchors.
    """

    def __init__(
        self,
        team: Team = ALONE,
        anchors: dict[str, Tensor] | None = None,
        *,
        weights: Sensitivity | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`anchors`, by the name of the first matrix of an input, are used, or else written to.

        `weights` are those of the tokens of this process, in their order; None: all are 1.
        """
        self._team, self._device = team, device
        self._anchors = {} if anchors is None else anchors
        self._settled = bool(self._anchors) or not team.exact
        self._waiting: list[tuple[str, Tensor, Tensor | None]] = []
        self.weights, self._roots = weights, dict[str, Tensor | None]()
        self._inputs = Inputs()
        self._leader = self._inputs.names
        self._sums: dict[str, Hessian] = {}
        self._tokens: Counter[str] = Counter()

    def see(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        """A forward pre-hook, once `name` is bound."""
        x = args[0] if args else next(iter(kwargs.values()))
        if x.numel() == 0:  # an expert that no token of this batch chose
            self._tokens[name] += 0
            return
        first, before = self._inputs.name(name, x), self._tokens[name]
        self._tokens[name] += x.numel() // x.shape[-1]
        if first != name:
            return
        roots = self._roots_of(name)
        if roots is not None:
            roots = roots[before : self._tokens[name]].to(x.device)
        if self._settled or self._team.leads:
            self._add(name, x, roots)
        else:
            self._waiting.append((name, x.clone(), roots))  # a block may change its inputs in place

    def end_batch(self) -> None:
        """Let go of the inputs of a batch; after the first, all of a team know the anchors."""
        self._inputs.end_batch()
        if self._settled:
            return
        found = {name: own.anchors for name, own in self._sums.items() if own.anchors is not None}
        _, anchors = self._team.spread(None, found, 0, device=self._device)
        self._anchors.update(anchors)
        self._settled = True
        for name, x, roots in self._waiting:
            self._add(name, x, roots)
        self._waiting.clear()

    def join(self) -> None:
        """Know what all processes of the team have seen; each has its own sums still.

        Raises NonFinite, naming the matrix, where inputs are NaN or infinite. Raises Outgrown where
        sums are not exact, with anchors to repeat the pass with.
        """
        heard = self._team.hear(
            [self._leader, self._tokens, {name: len(x.squares) for name, x in self._sums.items()}]
        )
        self._tokens = Counter()
        for _, tokens, _ in heard:
            self._tokens.update(tokens)
        self._leader = {
            name: own for leader, _, _ in reversed(heard) for name, own in leader.items()
        }
        sizes = {name: n for _, _, own in heard for name, n in own.items()}
        self._sums = {name: self._sums.get(name) or self._new(name, n) for name, n in sizes.items()}
        if not self._sums:
            return
        squares = _everyones(self._team.sum, [x.squares for x in self._sums.values()])
        for name, own in zip(self._sums, squares, strict=True):
            if not (own / self._tokens[name]).float().isfinite().all():  # as in Hessian.is_finite
                raise NonFinite(
                    f"{name}: NaN or infinity among its inputs on the calibration tokens; "
                    "load the model as float32, or check its weights"
                )
        anchors = [x.anchors for x in self._sums.values() if x.anchors is not None]
        if self._team.exact and outgrown(torch.cat(squares), torch.cat(anchors)):
            self._anchor_anew()
            raise Outgrown

    def hessians(self, matrices: Mapping[str, Matrix]) -> dict[str, Hessian]:
        """The Hessian of every matrix, by name.

        A member of a nn.ModuleList that no token reached (an expert, where experts are no fused
        module) has H = I, and is rounded to nearest: what it would have seen is not known. Raises
        UnsupportedModel for any other matrix that never ran, NonFinite where inputs are.
        """
        for own in self._sums.values() if self._team.size == 1 else ():
            own.finish()  # else not before the others' sums are added
        ran = {_place(name) for name in matrices if self._tokens[name]}
        found, idle = {}, []
        for name, matrix in matrices.items():
            if self._tokens[name]:
                found[name] = self._of(name)
            elif name in self._tokens or _place(name) in ran:
                found[name] = _identity(matrix)
                idle.append(name)
            else:
                raise UnsupportedModel(
                    f"{name} never ran: it is used without calling its module, or not at all"
                )
        if idle:
            log.warning(
                "%d matrices of experts that no token reached are rounded to nearest, the first "
                "of them %s; more samples help",
                *(len(idle), idle[0]),
            )
        return found

    def _of(self, name: str) -> Hessian:
        leader = self._leader[name]
        if self._tokens[name] != self._tokens[leader]:
            raise UnsupportedModel(
                f"{name} shares its first input with {leader} but not the later ones; only "
                "matrices that run once per pass can be walked"
            )
        return self._sums[leader]

    def _roots_of(self, name: str) -> Tensor | None:
        """The roots of the weights of all tokens of an input, if it has any."""
        if self.weights is not None and name not in self._roots:
            self._roots[name] = self.weights.roots(name)
        return self._roots.get(name)

    def _add(self, name: str, x: Tensor, roots: Tensor | None) -> None:
        if name not in self._sums:
            self._sums[name] = self._new(name, x.shape[-1])
        self._sums[name].update(x, roots)

    def _new(self, name: str, n: int) -> Hessian:
        """Sums to begin with; what the first batch did not see has anchors that it outgrows."""
        anchors = self._anchors.get(name)
        if anchors is None and self._settled and self._team.exact:
            anchors = anchors_of(torch.zeros(n, device=self._device))
        return Hessian(n, anchors=anchors, exact=self._team.exact, device=self._device)

    def _anchor_anew(self) -> None:
        largest = _everyones(self._team.largest, [x.largest for x in self._sums.values()])
        chunks = self._team.sum(torch.tensor([x.chunks for x in self._sums.values()])).tolist()
        for name, own, count in zip(self._sums, largest, chunks, strict=True):
            self._anchors[name] = anchors_of(own, count)


def _place(name: str) -> str:
    """The name of a matrix, the same for all members of a list of modules."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _identity(matrix: Matrix) -> Hessian:
    found = Hessian(matrix.columns, device=matrix.weight.device)
    found.update(torch.eye(matrix.columns, device=matrix.weight.device))
    return found


def _everyones(of_all: Callable[[Tensor], Tensor], parts: list[Tensor]) -> tuple[Tensor, ...]:
    """What a team makes of tensors of one axis that each of its processes has."""
    return of_all(torch.cat(parts)).split([len(part) for part in parts])
