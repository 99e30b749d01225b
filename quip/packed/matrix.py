"""A quantized weight matrix as a value."""

from dataclasses import dataclass

from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks.base import Codebook, Decoder
from quip.kernels.bits import pack
from quip.transforms import Chain


@dataclass(frozen=True, kw_only=True)
class QuantizedMatrix:
    """A quantized weight matrix in the basis of its transform, columns in natural order."""

    codes: Integer[Tensor, "m k"]
    decoder: Decoder
    transform: Chain
    damp: float  # as used, after escalation
    book: Codebook | None = None  # of the recipe, before it was fitted: which of its trials

    def dequantize(self) -> Float[Tensor, "m n"]:
        """W_hat in the original basis, float32."""
        return self.transform.undo(self.decoder.decode(self.codes).double()).float()

    def tensors(self) -> dict[str, Tensor]:
        """All that must be stored for the matrix; the codes as packed words."""
        codes = {"codes": pack(self.codes, self.decoder.index_bits)}
        return codes | self.decoder.tensors() | self.transform.tensors()

    @property
    def bits_per_weight(self) -> float:
        """The bits of all `tensors`, whose shapes are known, over the number of weights."""
        m, n = len(self.codes), self.codes.shape[1] * self.decoder.dim
        stored = 0
        for part in (self.decoder, *self.transform.links):
            stored += sum(x.nbytes for x in type(part).empty(m, n, **part.options()).values())
        return 8 * stored / (m * n)
