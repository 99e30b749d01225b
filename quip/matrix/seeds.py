"""One generator for each matrix."""

import hashlib

import torch


def rng_for(seed: int, name: str) -> torch.Generator:
    """The generator of one matrix: the same whatever else is quantized, and in any order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
