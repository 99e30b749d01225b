"""A decoder block and its matrices, with nothing passing through."""

from collections.abc import Iterator

import torch
from torch import nn

from quip.model.matrices import find_blocks


class BlockModule:
    """One decoder block on the device: its matrices, to be replaced one by one."""

    def __init__(self, index: int, name: str, module: nn.Module, *, device: torch.device) -> None:
        self.index, self.name, self.module, self._device = index, name, module, device

    def linears(self) -> dict[str, nn.Linear]:
        """Full dotted name -> matrix, for every nn.Linear that has not been replaced."""
        return {
            f"{self.name}.{name}": module
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear)
        }

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module where the matrix of this full dotted name is."""
        module = module.to(self._device).train(self.module.training)
        self.module.set_submodule(name.removeprefix(f"{self.name}."), module, strict=True)


def standing(model: nn.Module, *, device: torch.device | str) -> Iterator[BlockModule]:
    """Each decoder block in order, on the device while the loop body runs, fed by nothing."""
    prefix, blocks = find_blocks(model)
    device, host = torch.device(device), next(model.parameters()).device
    for index, module in enumerate(blocks):
        try:
            yield BlockModule(index, f"{prefix}.{index}", module.to(device), device=device)
        finally:
            module.to(host)
