"""QuantizedLinear: a matrix that stays packed in memory, and computes as a layer of a model.

With W_hat = A^-1 W~ B, where W~ are the decoded weights and A, B the transform,

    y = W_hat x + b = A^-1 (W~ (B x)) + b.

For few tokens the products are taken from the right, as written. For about as many tokens as the
matrix has rows and columns it is cheaper to transform the weights: (A^-1 W~ B) x. Either way a
dense matrix exists only while its own layer runs, and for a few tokens on a CPU not even then.
Transforms are computed in float32 at least: they cost little, and a rotation in half precision
would add an error of the size of rounding W~.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from quip.codebooks import Decoder
from quip.kernels.bits import unpack
from quip.packed.matrix import QuantizedMatrix
from quip.packed.spec import Spec
from quip.transforms import Chain

Held = tuple[weakref.ref[Tensor], int]  # a tensor, and its version
INTEGERS = {2: torch.int16, 4: torch.int32}  # of the size of a float


class QuantizedLinear(nn.Module):
    """nn.Linear with a quantized weight: W_hat is held as packed codes and small tensors.

    Made empty from its sizes and a specification, for a checkpoint to fill (also on the meta
    device); or full from a quantized matrix. The stored tensors are buffers. They move with
    the model but are never cast: only the bias follows the model's dtype.
    """

    codes: Tensor
    bias: Tensor | None

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
        for name, tensor in spec.empty(out_features, in_features).items():
            self.register_buffer(name, torch.empty_like(tensor, device=device or "cpu"))
        empty_bias(self, out_features if bias else None, device, dtype)
        self._held: list[Held] = []  # the buffers that _parts was made of

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
        y = self.product(x).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def product(
        self, x: Float[Tensor, "*batch n"], scales: Float[Tensor, " m"] | None = None
    ) -> Float[Tensor, "*batch m"]:
        """diag(scales) W_hat x, without bias; in the dtype of x, or in one wider."""
        if x.shape[-1] != self.in_features:  # a permutation would just leave columns out
            raise ValueError(f"inputs of {x.shape[-1]} numbers, to a matrix for {self.in_features}")
        decoder, transform = self._parts()
        wide = torch.promote_types(x.dtype, torch.float32)
        m, n, tokens = self.out_features, self.in_features, x.numel() // self.in_features
        if tokens * (m + n) > 2 * m * n:
            W = transform.undo(decoder.decode(self._codes(decoder)).to(wide))
            return linear(x, (W if scales is None else W * scales[:, None]).to(x.dtype))
        x_t = transform.input(x.to(wide))
        # A rotation may gather all of |x| in one number, beyond the range of float16.
        dtype = wide if x.dtype == torch.float16 else x.dtype
        y = transform.output(decoder.multiply(self.codes, x_t, dtype))
        return y if scales is None else y * scales

    def dequantize(self) -> Float[Tensor, "m n"]:
        """W_hat in the original basis, float32."""
        decoder, transform = self._parts()
        return transform.undo(decoder.decode(self._codes(decoder)).double()).float()

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
    def qweight(self) -> Tensor:
        """The packed codes. peft asks a layer by this name where it is, and puts adapters there."""
        return self.codes

    def extra_repr(self) -> str:
        parts = [self.spec.codebook, *self.spec.transforms]
        words = "; ".join(" ".join(f"{k}={v}" for k, v in part.items()) for part in parts)
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {words}"

    def _codes(self, decoder: Decoder) -> Tensor:
        return unpack(self.codes, decoder.index_bits, self.in_features // decoder.dim)

    def _parts(self) -> tuple[Decoder, Chain]:
        """Made of the buffers when these are first used, and again when one was changed."""
        tensors = self.stored()
        # Tensors made under inference_mode have no version.
        now = [(x, -1 if x.is_inference() else x._version) for x in tensors.values()]
        if not _same(self._held, now):
            with torch.inference_mode(False):  # what is made may be used in training later
                self._made = self.spec.restore(tensors, self.out_features, self.in_features)
            self._held = [(weakref.ref(x), version) for x, version in now]
        return self._made

    def _forget(self) -> None:
        self._held = []
        vars(self).pop("_made", None)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold the packed tensors, not what these were unpacked to.
        state = {name: x for name, x in vars(self).items() if name != "_made"}
        return {**state, "_held": []}

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


def _same(held: list[Held], now: list[tuple[Tensor, int]]) -> bool:
    return bool(held) and all(a() is b and i == j for (a, i), (b, j) in zip(held, now, strict=True))
