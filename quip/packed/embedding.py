"""Embeddings that stay packed: the rows of the tokens that come are decoded. And tied heads."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from quip.packed import ops
from quip.packed.linear import QuantizedLinear, empty_bias
from quip.packed.spec import Spec


class QuantizedEmbedding(QuantizedLinear):
    """nn.Embedding with a quantized weight, one row a token, whose codes are of plain grids.

    `like` has no numbers: it is the parameter by which a model finds device and dtype, and the
    dtype of the rows that are given.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        *,
        spec: Spec,
        device: torch.device | str | None = None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(columns, rows, False, spec=spec, device=device)
        like = torch.empty(0, device=device, dtype=dtype)
        self.like = nn.Parameter(like, requires_grad=False)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch n"]:
        if torch.compiler.is_compiling():
            stored = list(self.stored().values())
            return ops.rows(ids, stored, self._words, self.in_features, self.like)
        found = self._parts().rows(ids, self.codes, self.in_features)
        return found.to(self.like.dtype)


class TiedHead(nn.Module):
    """nn.Linear whose weight is that of a packed embedding."""

    bias: Tensor | None

    def __init__(
        self,
        embedding: QuantizedEmbedding,
        bias: bool,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._shared = (embedding,)  # in a tuple: no module of this one
        self.in_features, self.out_features = embedding.in_features, embedding.out_features
        empty_bias(self, self.out_features if bias else None, device, dtype)

    @property
    def embedding(self) -> QuantizedEmbedding:
        """Whose codes these are."""
        return self._shared[0]

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        table = self.embedding
        y = table.traced(x) if torch.compiler.is_compiling() else table.product(x).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def tied_heads(model: nn.Module) -> dict[str, str]:
    """The name of each tied head of a model, and that of its embedding."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        name: names[id(module.embedding)]
        for name, module in model.named_modules()
        if isinstance(module, TiedHead)
    }
