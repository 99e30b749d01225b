"""One Hessian for each distinct input of a block's matrices."""

import logging
import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quip.errors import NonFinite, UnsupportedModel
from quip.matrix.hessian import Hessian
from quip.model.matrices import Matrix

log = logging.getLogger(__name__)


class Observer:
    """One Hessian per distinct input tensor, whichever matrices it feeds.

    Matrices share when their first inputs are the same memory, unmodified. The inputs of the
    running batch are held, so that no address is used twice.
    """

    def __init__(self) -> None:
        self._leader: dict[str, str] = {}
        self._sums: dict[str, Hessian] = {}
        self._tokens: Counter[str] = Counter()
        self._inputs: dict[tuple, tuple[str, Tensor]] = {}

    def see(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        """A forward pre-hook, once `name` is bound."""
        x = args[0] if args else next(iter(kwargs.values()))
        if x.numel() == 0:  # an expert that no token of this batch chose
            self._tokens[name] += 0
            return
        if name not in self._leader:
            # A flattened view of x is x.
            shape = x.shape[-1:] if x.is_contiguous() else (*x.shape, *x.stride())
            key = (x.data_ptr(), x.numel(), *shape, x._version)
            leader, _ = self._inputs.setdefault(key, (name, x))
            self._leader[name] = leader
            if leader == name:
                self._sums[name] = Hessian(x.shape[-1], device=x.device)
        self._tokens[name] += x.numel() // x.shape[-1]
        if self._leader[name] == name:
            self._sums[name].update(x)

    def forget_inputs(self) -> None:
        self._inputs.clear()

    def hessians(self, matrices: Mapping[str, Matrix]) -> dict[str, Hessian]:
        """The Hessian of every matrix, by name.

        A member of a nn.ModuleList that no token reached (an expert, where experts are no fused
        module) has H = I, and is rounded to nearest: what it would have seen is not known. Raises
        UnsupportedModel for any other matrix that never ran, NonFinite where inputs are.
        """
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
        for name, hessian in self._sums.items():
            if not hessian.is_finite:
                raise NonFinite(
                    f"{name}: NaN or infinity among its inputs on the calibration tokens; "
                    "load the model as float32, or check its weights"
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


def _place(name: str) -> str:
    """The name of a matrix, the same for all members of a list of modules."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _identity(matrix: Matrix) -> Hessian:
    found = Hessian(matrix.columns, device=matrix.weight.device)
    found.update(torch.eye(matrix.columns, device=matrix.weight.device))
    return found
