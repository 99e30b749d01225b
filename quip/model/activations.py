"""Where hidden states live: in memory, or in a file that is mapped into it where they are many."""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quip.files import make_folder, writing
from quip.model.device import free_host_bytes

SHARE = 4  # of the free memory, one part of so many


@dataclass(frozen=True)
class Activations:
    """Room for hidden states: up to so many bytes in memory, and beyond that on the disk.

    Pages that were written go to the disk by themselves when memory is short, and come back when
    they are read; a block reads and writes its batches in their order.
    """

    limit: int = sys.maxsize
    folder: Path | None = None  # None: that of temporary files

    @classmethod
    def within(cls, gigabytes: float | None, folder: Path | None) -> "Activations":
        """Room for so many GB in memory, by default a quarter of what is free."""
        free = free_host_bytes() // SHARE
        return cls(free if gigabytes is None else int(gigabytes * 1e9), folder)

    def exceed(self, nbytes: int) -> bool:
        """Whether hidden states of so many bytes go to the disk."""
        return nbytes > self.limit

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for hidden states on the host, without content.

        Raises Unavailable where the disk has no room.
        """
        size = torch.Size(shape).numel()
        if not self.exceed(size * dtype.itemsize):
            return torch.empty(shape, dtype=dtype)
        return self._mapped(size * dtype.itemsize).view(dtype).view(shape)

    def _mapped(self, nbytes: int) -> Tensor:
        folder = self.folder or Path(tempfile.gettempdir())
        with writing(folder):
            make_folder(folder)
            descriptor, name = tempfile.mkstemp(prefix=".activations-", dir=folder)
            try:
                # All of it now: a disk that is full later would end the process.
                os.posix_fallocate(descriptor, 0, nbytes)
                return torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8)
            finally:
                os.close(descriptor)
                os.unlink(name)  # it goes with the tensor, however the process ends
