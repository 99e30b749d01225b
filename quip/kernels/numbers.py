"""Numbers as tensors hold them, for kernels on CUDA: the Python side of numbers.cuh."""

import torch
from torch import Tensor

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ALIGNED = 16  # bytes: four numbers are read at once


def laid_out(x: Tensor) -> Tensor:
    """The tensor without its gradient, contiguous, and aligned as kernels read it."""
    x = x.detach().contiguous()
    return x.clone() if x.data_ptr() % ALIGNED else x
