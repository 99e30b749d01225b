"""Packed matrices that other engines hold as they are: integer grids in the basis of the model.

What comes of a matrix is whole numbers times scales, w_hat = scale (code - zero), with a zero of
2^(b-1) where it is symmetric. A grid whose levels are odd halves of a step (grid b, that is) takes
b + 1 bits for it: 2 code + 1 - 2^b in units of half a step.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel

from quip.codebooks import Grids
from quip.codebooks.grids import middle
from quip.errors import UsageError
from quip.kernels.bits import unpack
from quip.packed.experts import Experts
from quip.packed.linear import QuantizedLinear, quantized_layers
from quip.packed.published import exactly
from quip.packed.stack import Stack

AGAIN = "quantize the model again with --quant gptq --wbits 4 --groupsize 128 --sym"
COMMON = (128, 64, 32)  # columns of a group that engines have kernels for, the usual one first
REMEDY = f"{AGAIN}, or export it with --dense"


@dataclass(frozen=True)
class Plain:
    """A packed matrix by its name, as whole numbers times scales."""

    name: str
    layer: QuantizedLinear
    grids: Grids

    @property
    def halves(self) -> bool:
        """Whether levels are odd multiples of half a step."""
        return self.grids.zeros is None

    @property
    def symmetric(self) -> bool:
        return self.halves or self.grids.signed

    @property
    def bits(self) -> int:
        return self.grids.bits + self.halves

    @property
    def group(self) -> int | None:
        """Columns that share a scale; None: all of a row."""
        return None if self.grids.groups.count == 1 else self.grids.groups.size

    @property
    def scale(self) -> Float[Tensor, "m groups"]:
        m, step = self.layer.out_features, self.grids.step
        return (step / 2).expand(m, -1) if self.halves else step

    def scale_in(self, dtype: torch.dtype) -> Float[Tensor, "m groups"] | None:
        """The scales in another type; None where that does not hold all of them exactly.

        A group of zeros has any scale: one that the type does not hold becomes 1.
        """
        scale = self.scale
        found = exactly(scale, dtype)
        if found is not None or self.halves:
            return found
        zero = middle(self.bits) if self.grids.signed else self.zero.unsqueeze(-1)
        groups = self.codes().unflatten(1, (scale.shape[1], -1))
        return exactly(scale.masked_fill((groups == zero).all(-1), 1), dtype)

    @property
    def zero(self) -> UInt8[Tensor, "m groups"]:
        """The code of weight 0 of a matrix that is not symmetric."""
        assert self.grids.zero is not None
        return self.grids.zero

    def codes(self) -> Integer[Tensor, "m n"]:
        """The codes, from 0 to 2^bits - 1."""
        codes = unpack(self.layer.codes, self.grids.bits, self.layer.in_features)
        return 2 * codes.short() + 1 if self.halves else codes


def plain_matrices(model: PreTrainedModel, where: str) -> list[Plain]:
    """The packed matrices of a model. Raises UsageError for one that is none; `where` names what
    has no place for it.
    """
    found = []
    mixture = any(isinstance(module, Experts) for module in model.modules())
    for name, layer in sorted(quantized_layers(model).items()):
        if why := "of a mixture of experts" if mixture else _other(layer):
            raise UsageError(f"{name} is {why}, for which {where} has no place; {REMEDY}")
        grids, _ = layer.spec.restore(layer.stored(), layer.out_features, layer.in_features)
        assert isinstance(grids, Grids)
        found.append(Plain(name, layer, grids))
    _check_groups(found, where)
    return found


def _check_groups(found: list[Plain], where: str) -> None:
    """Raise UsageError where the last group of columns of a matrix is short."""
    widths = {matrix.layer.in_features for matrix in found}
    for matrix in found:
        n = matrix.layer.in_features
        if matrix.group and n % matrix.group:
            whole = (f"with --groupsize {g}" for g in COMMON if not any(n % g for n in widths))
            raise UsageError(
                f"{matrix.name} has groups of {matrix.group} columns, of which its {n} are no "
                f"multiple, as {where} needs them; quantize the model again "
                f"{next(whole, 'without --groupsize')}, or export it with --dense"
            )


def _other(layer: QuantizedLinear) -> str | None:
    """What a matrix is that is no plain grid."""
    spec = layer.spec
    if spec.transforms:
        return f"transformed ({', '.join(part['kind'] for part in spec.transforms)})"
    if spec.codebook["kind"] != "grid":
        return f"of {spec.codebook['kind']} codes"
    if isinstance(layer, Stack):
        return "a stack of several"
    return "a Conv1D of transformers" if layer.is_conv1d else None


def left_dense(model: nn.Module) -> list[str]:
    """The names of the nn.Linear modules that are not packed, such as lm_head."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def with_packed(model: PreTrainedModel, packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a model with these for those of its packed matrices, biases as they were."""
    ours = {f"{name}.{key}" for name, x in quantized_layers(model).items() for key in x.stored()}
    state = {key: x for key, x in model.state_dict().items() if key not in ours}
    return state | {f"{name}.{key}": x for name, own in packed.items() for key, x in own.items()}
