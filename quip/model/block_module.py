"""A decoder block at rest: its matrices, by name."""

import torch
from torch import nn

from quip.model.matrices import Matrix, matrices_of
from quip.packed.exchange import replace
from quip.packed.experts import Expert


class BlockModule:
    """One decoder block on the device: its matrices, to be replaced one by one."""

    def __init__(self, index: int, name: str, module: nn.Module, *, device: torch.device) -> None:
        self.index, self.name, self.module, self._device = index, name, module, device

    @property
    def device(self) -> torch.device:
        """Where the block is, and its matrices go."""
        return self._device

    def matrices(self) -> dict[str, Matrix]:
        """Full dotted name -> matrix, for every one that is to be quantized and still dense."""
        return {matrix.name: matrix for matrix in matrices_of(self.module, self.name)}

    def is_expert(self, name: str) -> bool:
        """Whether the matrix of this full dotted name sees only what a router sends to it."""
        owner = name.removeprefix(f"{self.name}.").rpartition(".")[0]
        return isinstance(self.module.get_submodule(owner), Expert)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module where the matrix of this full dotted name is."""
        module = module.to(self._device).train(self.module.training)
        replace(self.module, name.removeprefix(f"{self.name}."), module)
