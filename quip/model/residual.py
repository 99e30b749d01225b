"""What passes by matrices of a block while it runs, and what they write to the residual stream.

Hidden states that enter are the stream, and so is every sum of it and something else. The output y
of a matrix carries to sums with what is not the stream; its first sum with the stream is what the
output makes of that:

    h + y            o_proj and down_proj of most models
    (y + z) + h      where attention and MLP stand side by side, of both
    h + norm(y)      of none: y itself is not added to anything
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
Key: TypeAlias = tuple[int, int]  # a view of all numbers is the same place


class Reached(Exception):
    """Ends a run of a block where nothing after it is needed."""


class Residual(TorchDispatchMode):
    """Inside it a block runs once: what enters and leaves matrices, and the `sums` of the latter.

    `until` are the names of all that are watched, and of those whose sums are waited for; once all
    is there, it raises Reached.
    """

    def __init__(self, until: tuple[Collection[str], Collection[str]] | None = None) -> None:
        super().__init__()
        self._until = until
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # the stream with the output of a matrix
        self._calls = 0
        self._stream: set[Key] = set()
        self._carried: dict[Key, set[str]] = {}
        self._held: list[Tensor] = []  # so that no address is used twice

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the block, whose first tensor are the hidden states."""
        leaves = pytree.tree_leaves((args, kwargs))
        self._stream.add(self._key(next(x for x in leaves if isinstance(x, Tensor))))

    def hook(self, name: str) -> Callable[..., None]:
        """A forward hook of the matrix of this name."""

        def see(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
        ) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # Copies, as a block may change in place what it handed over.
            self._inputs[name] = x.clone() if not self._inputs else x
            self._outputs[name] = y.clone()
            self._calls += 1
            self._carried.setdefault(self._key(y), set()).add(name)
            self._stop()

        return see

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ADDS and not kwargs:  # none of which multiplies a term
            self._added([self._key(x) for x in args if isinstance(x, Tensor)], result)
        return result

    def is_whole(self, names: Collection[str], windows: tuple[int, int]) -> bool:
        """Whether each of these matrices saw all tokens of so many windows, once."""
        tokens = windows[0] * windows[1]
        return self._calls == len(names) and all(
            name in self._inputs and self._inputs[name].shape[:-1].numel() == tokens
            for name in names
        )

    def inputs(self, name: str, windows: tuple[int, int]) -> Float[Tensor, "windows tokens n"]:
        """What entered a matrix."""
        return self._inputs[name].reshape(*windows, -1)

    def lack(
        self, name: str, other: "Residual", windows: tuple[int, int]
    ) -> Float[Tensor, "windows tokens m"]:
        """What the output of a matrix in another run lacks of what it is in this one."""
        both = name in self.sums and name in other.sums
        then, now = (one.sums[name] if both else one._outputs[name] for one in (self, other))
        wide = torch.promote_types(then.dtype, torch.float32)
        return (then.to(wide) - now.to(wide)).reshape(*windows, -1)

    def _added(self, terms: list[Key], total: Tensor) -> None:
        carried = {name for key in terms for name in self._carried.pop(key, ())}
        if not any(key in self._stream for key in terms):
            if carried:
                self._carried[self._key(total)] = carried
            return
        self._stream.add(self._key(total))
        for name in carried:
            self.sums[name] = total.clone()  # to which others may be added in place
        self._stop()

    def _stop(self) -> None:
        if self._until is None:
            return
        names, summed = self._until
        if self._outputs.keys() >= {*names} and self.sums.keys() >= {*summed}:
            raise Reached

    def _key(self, x: Tensor) -> Key:
        self._held.append(x)
        return x.data_ptr(), x.numel()
