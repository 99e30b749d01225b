"""Stacks: matrices of the same inputs (q, k and v; up and gate) that are quantized as one.

    W_hat ~ [W_1 / s_1]          y_i = s_i (rows i of W_hat x) + b_i
            [W_2 / s_2]
            [   ...   ]

A stack shares one transform, one sweep and, when the model runs, one product: the first member
that is called with x computes for all, and the others take their rows of the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quip.errors import QuipError
from quip.packed.linear import QuantizedLinear, empty_bias
from quip.packed.matrix import QuantizedMatrix
from quip.packed.parts import Answers
from quip.packed.spec import Spec

# As published files of QuIP# stack them; matrices of other names stay in the order of the model.
STACKED_ORDER = ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj")


def stacked(
    weights: Mapping[str, Float[Tensor, "_m n"]],
) -> tuple[Float[Tensor, "m n"], Float[Tensor, " count"]]:
    """([W_i / s_i], s): s_i is the RMS of W_i over that of all, so that each is as large."""
    sizes = torch.stack([W.float().square().mean().sqrt() for W in weights.values()])
    rows = torch.tensor([len(W) for W in weights.values()], device=sizes.device)
    mean = (sizes.square() * rows).sum().div(rows.sum()).sqrt()
    # Eight bits of mantissa, so that a file of any 16-bit type can hold them.
    scales = torch.where(sizes > 0, sizes / mean, 1).bfloat16().float()
    parts = [W.float() / s for W, s in zip(weights.values(), scales, strict=True)]
    return torch.cat(parts), scales


class Stack(QuantizedLinear):
    """The matrices of a stack as one quantized matrix, and their scales."""

    scales: Tensor

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        *,
        spec: Spec,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, sum(sizes), False, spec=spec, device=device)
        self.sizes = tuple(sizes)
        self.register_buffer("scales", torch.ones(len(sizes), device=device, dtype=torch.float32))
        self.answers = Answers()

    @classmethod
    def of(
        cls,
        matrix: QuantizedMatrix,
        scales: Float[Tensor, " count"],
        sizes: Sequence[int],
    ) -> "Stack":
        """The stack of this matrix, on the device of its codes."""
        n = matrix.codes.shape[1] * matrix.decoder.dim
        stack = cls(n, sizes, spec=Spec.of(matrix), device="meta")
        stack.fill(matrix.tensors() | {"scales": scales}, matrix.codes.device)
        return stack

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "*batch n"], index: int
    ) -> Float[Tensor, "*batch _m"]:
        """The answer of one member; those of the others are kept until they ask."""
        if torch.compiler.is_compiling():
            return self.traced(x, index)
        return self.answers.ask(x, index, self._answer)

    def dequantize(self) -> Float[Tensor, "m n"]:
        """The W_i, one below the other, in the original basis, float32."""
        scales = self.row_scales
        assert scales is not None
        return super().dequantize() * scales[:, None]

    @property
    def bits_per_weight(self) -> float:
        """The bits of all stored tensors, over the number of weights."""
        stored = 8 * sum(x.nbytes for x in self.stored().values())
        return stored / (self.in_features * self.out_features)

    def check(self) -> None:
        super().check()
        if not bool(((self.scales > 0) & self.scales.isfinite()).all()):
            raise QuipError("a scale of the stack is not a positive number: the file is damaged")

    def _answer(self, x: Float[Tensor, "*batch n"]) -> Sequence[Tensor]:
        return self.product(x).to(x.dtype).split(list(self.sizes), dim=-1)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "answers": Answers()}


class StackedLinear(nn.Module):
    """nn.Linear whose weight is some rows of a stack. The first member owns the stack."""

    bias: Tensor | None
    is_conv1d = False  # as QuantizedLinear has it

    def __init__(
        self,
        stack: Stack,
        index: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.index, self._shared = index, (stack,)  # in a tuple: no module of this one
        self.in_features, self.out_features = stack.in_features, stack.sizes[index]
        empty_bias(self, self.out_features if bias else None, device, dtype)
        if index == 0:
            self.stack = stack

    @property
    def whole(self) -> Stack:
        """The stack, whoever owns it."""
        return self._shared[0]

    @property
    def qweight(self) -> Tensor:
        """The packed codes. peft asks a layer by this name where it is, and puts adapters there."""
        return self.whole.codes

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        y = self.whole(x, self.index)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def dequantize(self) -> Float[Tensor, "m n"]:
        """W_hat in the original basis, float32."""
        return self.whole.dequantize().split(list(self.whole.sizes))[self.index]

    def extra_repr(self) -> str:
        place = f"{self.index + 1} of {len(self.whole.sizes)}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {place}"


def in_order(names: Sequence[str]) -> list[str]:
    """The names in the order in which their matrices are stacked."""
    last = [name.rpartition(".")[2] for name in names]
    if not set(last) <= set(STACKED_ORDER):
        return list(names)
    return [names[i] for i in sorted(range(len(names)), key=lambda i: STACKED_ORDER.index(last[i]))]


def stacks(model: nn.Module) -> list[dict[str, StackedLinear]]:
    """The members of each stack by name, in their order."""
    found: dict[int, dict[str, StackedLinear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, StackedLinear):
            found.setdefault(id(module.whole), {})[name] = module
    return [dict(sorted(s.items(), key=lambda item: item[1].index)) for s in found.values()]
