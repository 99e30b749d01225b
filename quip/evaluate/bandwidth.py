"""How fast a device copies, and how much a model reads to predict a token: what bounds decoding."""

import time
from functools import cache

import torch
from torch import nn

from quip.evaluate.memory import tensor_bytes
from quip.packed.embedding import QuantizedEmbedding, tied_heads

SIZES = {"cpu": 2**27, "cuda": 2**30}  # bytes that are copied: more than caches hold
COPIES = 3


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run on after their calls have returned
    return time.perf_counter()


@cache  # once a process: what a device can do does not change
def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy inside the memory of the device reads and writes, at its best."""
    size = SIZES[device.type]
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = min(size, free // 4)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(COPIES):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * size / min(seconds)


def bytes_read(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that each token needs, once, whatever the batch.

    Left out are tables of which a token looks up one row, unless they are the head as well.
    """
    tables = (nn.Embedding,) if tied_heads(model) else (nn.Embedding, QuantizedEmbedding)
    layers = (m for m in model.modules() if not isinstance(m, tables))
    tensors = (x for m in layers for x in (*m.parameters(False), *m.buffers(False)))
    return tensor_bytes(tensors)


def cache_bytes(cache: object) -> int:
    """Bytes of the keys and values in a cache of transformers."""
    layers = getattr(cache, "layers", [])
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return tensor_bytes(x for x in held if x is not None)
