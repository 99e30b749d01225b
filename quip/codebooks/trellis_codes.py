"""The values of trellis codes by name, and the size that weights should have when they meet them.

    mcg     x = 0xCBAC1FED s;  y = (x & 0x8FFF8FFF) ^ 0x3B603B60;  the sum of its halves in float16
    mul1    x = 0x83DCD12D s;  (1024 + the sum of its bytes) 0.0067673 - 10.3828 in float16

of the state s, all modulo 2^32 (EXL3).
"""

from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from quip.codebooks.names import Bits
from quip.errors import QuipError
from quip.kernels.trellis import Code

RHO = {1: 1.12, 1.5: 1.05, 2: 1.0, 2.5: 0.95, 3: 0.95, 3.5: 0.9, 4: 0.9}


def weights_per_step(name: str, bits: Bits) -> int:
    """V: the weights of a step at `bits` bits each."""
    return 2 if name == "hyb" or bits % 1 else 1


@cache
def code(name: str, bits: Bits, L: int, device: torch.device) -> Code:
    """The code of this name with 2^L states, for `bits` bits per weight."""
    V = weights_per_step(name, bits)
    if name not in VALUES:
        raise QuipError(f"no trellis code is called {name!r}; there are {', '.join(VALUES)}")
    values = VALUES[name](torch.arange(V * 2**L)).float()  # of two weights: those of two states
    return Code("table" if V > 1 else name, round(bits * V), values.view(-1, V).to(device))


@cache
def target_rms(name: str, bits: Bits, L: int) -> float:
    """The RMS that weights should have when they meet the code, for the least squared error."""
    table = code(name, bits, L, torch.device("cpu")).table
    return RHO[bits] * float(table.double().square().mean().sqrt())


def _mcg(s: Int64[Tensor, " states"]) -> Float[Tensor, " states"]:
    x = (s * 0xCBAC1FED) & 0xFFFFFFFF
    y = (x & 0x8FFF8FFF) ^ 0x3B603B60
    halves = torch.stack([y & 0xFFFF, y >> 16]).to(torch.int32).to(torch.int16)
    return halves.view(torch.float16).float().sum(0).half()


def _mul1(s: Int64[Tensor, " states"]) -> Float[Tensor, " states"]:
    x = (s * 0x83DCD12D) & 0xFFFFFFFF
    total = 1024 + sum((x >> shift) & 0xFF for shift in (0, 8, 16, 24))
    a, b = torch.tensor([0x1EEE, 0xC931 - 2**16], dtype=torch.int16).view(torch.float16).double()
    return (total * a + b).half()


VALUES = {"mcg": _mcg, "mul1": _mul1}
