"""One Hessian for each distinct input of a block's matrices."""

from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from quip.errors import NonFinite, UnsupportedModel
from quip.matrix.hessian import Hessian


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
        x = args[0] if args else kwargs["input"]
        if x.numel() == 0:  # an expert that no token of this batch chose
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

    def hessians(self, names: Iterable[str]) -> dict[str, Hessian]:
        for name in names:
            if not self._tokens[name]:
                raise UnsupportedModel(
                    f"{name} never ran: an expert that no calibration token chose (add samples), "
                    "or a matrix that is used without calling its module"
                )
            if self._tokens[name] != self._tokens[self._leader[name]]:
                raise UnsupportedModel(
                    f"{name} shares its first input with {self._leader[name]} but not the later "
                    "ones; only matrices that run once per pass can be walked"
                )
        for name, hessian in self._sums.items():
            if not hessian.is_finite:
                raise NonFinite(
                    f"{name}: NaN or infinity among its inputs on the calibration tokens; "
                    "load the model as float32, or check its weights"
                )
        return {name: self._sums[self._leader[name]] for name in names}
