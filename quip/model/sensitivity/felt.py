"""Hooks at the outputs of a block's matrices, which take squares of the gradient there."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from quip.model.block_module import BlockModule
from quip.model.inputs import Inputs, watched
from quip.model.sensitivity.labels import SCALE
from quip.packed.experts import Experts

ROWS = 512  # that are summed in float64 at once


class Felt:
    """Squares of the gradients in one block, unit after unit of the windows of this process.

    Of experts, tokens have one number for each expert that the router sent them to.
    """

    def __init__(self, block: BlockModule, *, apart: bool) -> None:
        """With `apart`, sums over tokens are kept of each unit, to be added up in their order."""
        self._apart, self.name = apart, block.name
        self._rows = {name: matrix.rows for name, matrix in block.matrices().items()}
        modules = {
            f"{block.name}.{name}": module
            for name, module in block.module.named_modules()
            if isinstance(module, Experts)
        }
        self.experts = {name: len(module) for name, module in modules.items()}
        self._parts = {
            name: [part for part, _ in module[0].named_children()]
            for name, module in modules.items()
        }
        self.inputs = Inputs()
        self.tokens: dict[str, list[Tensor]] = {}  # by input, s_t of each unit
        self.sent: dict[str, list[Tensor]] = {}  # by module of experts, those of each token
        self.slots: dict[str, list[Tensor]] = {}  # by module and part, s_t of each of those
        self.outputs: dict[str, list[Tensor]] = {}  # by matrix, sums of |x_t|^2 g_ti^2
        self.squares: dict[str, list[Tensor]] = {}  # and of |g_t|^2
        self._sizes: dict[str, Tensor] = {}
        self._of_unit: dict[str, tuple[Tensor, Tensor]] = {}
        self._index: dict[str, Tensor] = {}  # the experts that tokens of the unit were sent to
        self._places: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def watching(self, block: BlockModule) -> Iterator[None]:
        """Inside, the forward passes of the block, and the ways back through it, are watched."""
        hooks = [
            block.module.get_submodule(
                name.removeprefix(f"{block.name}.")
            ).register_forward_pre_hook(partial(self._see_sent, name), with_kwargs=True)
            for name in self._parts
        ]
        try:
            with watched(block.matrices(), self._see):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(
        self, name: str, _: nn.Module, args: tuple, kwargs: dict[str, Tensor], y: Tensor
    ) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        first = self.inputs.name(name, x)
        if first == name:
            x = x.detach().reshape(-1, x.shape[-1])
            self._sizes[name] = x.to(_wide(x)).square().sum(-1).double()
        if y.requires_grad:  # the loss feels nothing of what only chooses, such as an indexer
            y.register_hook(partial(self._feel, name, self._sizes[first]))

    def _feel(self, name: str, sizes: Float64[Tensor, " rows"], g: Tensor) -> None:
        g = g.detach().reshape(-1, g.shape[-1])
        squares = g.to(_wide(g)).div(SCALE).square()
        parts = zip(sizes.split(ROWS), squares.split(ROWS), strict=True)
        f = sum((size @ part.double() for size, part in parts), squares.new_zeros(()))
        self._of_unit[name] = squares.sum(-1).float(), f

    def _see_sent(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]
    ) -> None:
        assert isinstance(module, Experts)
        _, index, _ = module.routed(*args, *kwargs.values())
        self._index[name] = index
        self._places[name] = {e: (rows, slots) for e, rows, slots in module.active(index)}

    def end_unit(self, shape: tuple[int, int]) -> None:
        """Write down what a unit of so many windows, and tokens in each, has felt."""
        of_inputs: dict[str, Tensor] = {}
        for name, rows in self._rows.items():
            s, f = self._of_unit.get(name) or (torch.zeros(0), torch.zeros(rows).double())
            self._add(self.outputs, name, f)
            self._add(self.squares, name, s.sum(dtype=torch.float64))
            if name in self._of_unit and not self._is_sent(name):
                first = self.inputs.names[name]
                of_inputs[first] = of_inputs[first] + s if first in of_inputs else s
        for first, s in of_inputs.items():
            if len(s) == shape[0] * shape[1]:  # one row for each token, in their order
                self.tokens.setdefault(first, []).append(s.view(shape).to("cpu"))
        for name in self._places:
            self._end_experts(name, shape)
        self._of_unit.clear()
        self._places.clear()
        self.inputs.end_batch()

    def _end_experts(self, name: str, shape: tuple[int, int]) -> None:
        index = self._index[name]
        if len(index) != shape[0] * shape[1]:  # Llama 4 hands over a row for each token and expert
            return
        form = (*shape, index.shape[-1])
        self.sent.setdefault(name, []).append(index.view(form).to("cpu", torch.int32))
        for part in self._parts[name]:
            s = torch.zeros(index.shape, device=index.device)
            for expert, places in self._places[name].items():
                found = self._of_unit.get(f"{name}.{expert}.{part}")
                if found is not None:
                    s[places] = found[0]
            self.slots.setdefault(f"{name}.{part}", []).append(s.view(form).to("cpu"))

    def _is_sent(self, name: str) -> bool:
        """Whether a matrix is of an expert, and sees what a router sends."""
        return any(name.startswith(f"{owner}.") for owner in self._parts)

    def _add(self, sums: dict[str, list[Tensor]], name: str, found: Tensor) -> None:
        own, found = sums.setdefault(name, []), found.to("cpu")
        if own and not self._apart:
            own[0] = own[0] + found
        else:
            own.append(found)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
