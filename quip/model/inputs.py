"""Which matrices of a block are fed by the same tensor."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from quip.model.matrices import Matrix


class Inputs:
    """Distinct inputs of matrices, each of which bears the name of the first matrix that it feeds.

    Matrices share when their first inputs are the same memory, unmodified. The inputs of the
    running batch are held, so that no address is used twice.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # of the input of each matrix
        self._held: dict[tuple, tuple[str, Tensor]] = {}

    def name(self, matrix: str, x: Tensor) -> str:
        """The name of the input of a matrix, which is handed x now."""
        if matrix not in self.names:
            # A flattened view of x is x.
            shape = x.shape[-1:] if x.is_contiguous() else (*x.shape, *x.stride())
            key = (x.data_ptr(), x.numel(), *shape, x._version)
            self.names[matrix], _ = self._held.setdefault(key, (matrix, x))
        return self.names[matrix]

    def end_batch(self) -> None:
        """Let go of the inputs of a batch."""
        self._held.clear()


@contextmanager
def watched(matrices: Mapping[str, Matrix], see: Callable[..., None]) -> Iterator[None]:
    """Inside, `see` is told of each forward pass of these matrices, by their name."""
    hooks = [
        matrix.module.register_forward_hook(partial(see, name), with_kwargs=True)
        for name, matrix in matrices.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
