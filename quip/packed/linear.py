"""QuantizedLinear: a matrix that stays packed in memory, and computes as a layer of a model.

With W_hat = A^-1 W~ B, where W~ are the decoded weights and A, B the transform,

    y = W_hat x + b = A^-1 (W~ (B x)) + b.

For few tokens the products are taken from the right, as written. For about as many tokens as the
matrix has rows and columns it is cheaper to transform the weights: (A^-1 W~ B) x. Either way a
dense matrix exists only while its own layer runs, and for a few tokens on a CPU not even then.
Transforms are computed in float32 at least: they cost little, and a rotation in half precision
would add an error of the size of rounding W~.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from quip.packed import ops
from quip.packed.matrix import QuantizedMatrix
from quip.packed.parts import MADE, Parts, parts_of
from quip.packed.spec import Spec

INTEGERS = {2: torch.int16, 4: torch.int32}  # of the size of a float


class QuantizedLinear(nn.Module):
    """nn.Linear with a quantized weight: W_hat is held as packed codes and small tensors.

    Made empty from its sizes and a specification, for a checkpoint to fill (also on the meta
    device); or full from a quantized matrix. The stored tensors are buffers. They move with
    the model but are never cast: only the bias follows the model's dtype.
    """

    codes: Tensor
    bias: Tensor | None
    is_conv1d = False  # whether it is in place of one, of transformers', whose weight is [n, m]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: Spec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        self.sizes: tuple[int, ...] = (out_features,)  # the rows of each member of a stack
        for name, tensor in spec.empty(out_features, in_features).items():
            self.register_buffer(name, torch.empty_like(tensor, device=device or "cpu"))
        empty_bias(self, out_features if bias else None, device, dtype)
        self._words = json.dumps(spec.to_json())  # the specification, for ops.py
        self._made: Parts | None = None

    @classmethod
    def from_matrix(cls, matrix: QuantizedMatrix, bias: Tensor | None) -> "QuantizedLinear":
        """The layer of this matrix, on the device of its codes."""
        m, n = len(matrix.codes), matrix.codes.shape[1] * matrix.decoder.dim
        layer = cls(n, m, bias is not None, spec=Spec.of(matrix), device="meta")
        layer.fill(matrix.tensors(), matrix.codes.device)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def fill(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take these as the stored tensors."""
        for name in self.stored():
            setattr(self, name, tensors[name].to(device))

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        y = self.traced(x) if torch.compiler.is_compiling() else self.product(x).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def product(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """diag(row_scales) W_hat x, without bias; in the dtype of x, or in one wider."""
        self._check_width(x)
        return self._parts().multiply(x, self.codes)

    def traced(self, x: Float[Tensor, "*batch n"], index: int = 0) -> Float[Tensor, "*batch _m"]:
        """What member `index` of a stack answers, in the dtype of x, as one operator of a graph.

        With ops.ALL that is what all of them do, one after the other.
        """
        self._check_width(x)
        stored = list(self.stored().values())
        return ops.product(x, stored, self._words, self.sizes, index)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:  # a permutation would just leave columns out
            raise ValueError(f"inputs of {x.shape[-1]} numbers, to a matrix for {self.in_features}")

    def dequantize(self) -> Float[Tensor, "m n"]:
        """W_hat in the original basis, float32."""
        return self._parts().dense(self.codes, self.in_features, torch.float64).float()

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The dense layer of the same W_hat, rounded to dtype."""
        return dense_linear(self.dequantize(), self.bias, dtype)

    def check(self) -> None:
        """Raise QuipError if the stored tensors make no matrix."""
        self._parts()

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: x for name, x in self._buffers.items() if x is not None}

    @property
    def row_scales(self) -> Float[Tensor, " m"] | None:
        """What each row of a stack is multiplied by; None of a matrix that is no stack."""
        return self._parts().scales

    @property
    def qweight(self) -> Tensor:
        """The packed codes. peft asks a layer by this name where it is, and puts adapters there."""
        return self.codes

    def extra_repr(self) -> str:
        parts = [self.spec.codebook, *self.spec.transforms]
        words = "; ".join(" ".join(f"{k}={v}" for k, v in part.items()) for part in parts)
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {words}"

    def _parts(self) -> Parts:
        """Made of the buffers when these are first used, and again when one was changed."""
        tensors, made = self.stored(), self._made
        if made is None or not made.fit(tensors):
            made = self._made = parts_of(tensors, self.spec, self.sizes, self.in_features)
        return made

    def _forget(self) -> None:
        self._made = None
        MADE.pop(self.codes, None)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold the packed tensors, not what these were unpacked to.
        return {**vars(self), "_made": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._forget()  # or what was made on one device would stay there
        # Casts leave integers alone: as such the floats among the buffers only move.
        floats = {k: x.dtype for k, x in self.stored().items() if x.is_floating_point()}
        for name, dtype in floats.items():
            self._buffers[name] = self.stored()[name].view(INTEGERS[dtype.itemsize])
        try:
            super()._apply(fn, recurse)
        finally:
            for name, dtype in floats.items():
                self._buffers[name] = self.stored()[name].view(dtype)
        return self


class TwoStepLinear(nn.Linear):
    """nn.Linear that rounds between product and bias, as experts with biases do."""

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


def empty_bias(
    module: nn.Module,
    size: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Give the module a bias without content; None: no bias."""
    empty = None if size is None else torch.empty(size, device=device, dtype=dtype)
    bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
    module.register_parameter("bias", bias)


def dense_linear(W: Float[Tensor, "m n"], bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """The layer of this matrix, rounded to dtype."""
    m, n = W.shape
    dense = nn.Linear(n, m, bias=False, device="meta")
    dense.weight = nn.Parameter(W.to(dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return dense


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The packed matrices of a model by name; a stack counts as one."""
    layers = model.named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, QuantizedLinear)}
