"""Another order of the inputs, as checkpoints have it that were quantized elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.kernels.bits import pack, words
from quip.stored import Options
from quip.transforms.rotation import index_bits, permutation


@dataclass(frozen=True)
class Order:
    """W P^T, P H P^T: column j becomes what was column order[j].

    Groups of columns that lie scattered, as they do where GPTQ sorts inputs by their size
    (desc_act), lie side by side in another order. No method of ours draws one: it is read.
    """

    order: Integer[Tensor, " n"]

    def options(self) -> Options:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"order": pack(self.order, index_bits(len(self.order)))}

    @classmethod
    def empty(cls, m: int, n: int) -> dict[str, Tensor]:
        size = words(n, index_bits(n))
        return {"order": torch.empty(size, dtype=torch.int32, device="meta")}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], m: int, n: int) -> "Order":
        packed = tensors["order"]
        return cls(permutation(packed.cpu(), n).to(packed.device))

    def apply(
        self, W: Float[Tensor, "m n"], H: Float[Tensor, "n n"], *, in_place: bool = False
    ) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
        turned = H[self.order][:, self.order]
        return W[:, self.order], H.copy_(turned) if in_place else turned

    def undo(self, W_hat: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return torch.empty_like(W_hat).index_copy_(1, self.order.long(), W_hat)

    def input(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return x.index_select(-1, self.order)

    def output(self, y: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
        return y
