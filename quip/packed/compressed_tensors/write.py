"""A model of packed grids as tensors of compressed-tensors, every number as it is."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quip.errors import UsageError
from quip.packed.compressed_tensors.format import (
    BITS,
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    Scheme,
    config_words,
)
from quip.packed.plain import AGAIN, REMEDY, Plain, left_dense, plain_matrices, with_packed
from quip.packed.streams import pack_stream

WHERE = "compressed-tensors"


def compressed_tensors(
    model: PreTrainedModel, *, asymmetric: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor of the files, and `quantization_config`.

    Raises UsageError for a matrix that the format has no place for, and, unless `asymmetric` asks
    for them, for one with zeros, which vLLM reads and transformers does not.
    """
    found = plain_matrices(model, WHERE)
    schemes = {matrix.name: _scheme(matrix, asymmetric=asymmetric) for matrix in found}
    scales = {matrix.name: _scale(matrix, model.dtype) for matrix in found}
    packed = {x.name: _tensors(x, schemes[x.name], scales[x.name]) for x in found}
    return with_packed(model, packed), config_words(_targets(schemes), left_dense(model))


def _targets(schemes: dict[str, Scheme]) -> dict[Scheme, list[str]]:
    """What each scheme is for: all of their class where there is one, else modules by name."""
    targets: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        targets.setdefault(scheme, []).append(name)
    return targets if len(targets) > 1 else {scheme: ["Linear"] for scheme in targets}


def _scheme(matrix: Plain, *, asymmetric: bool) -> Scheme:
    if matrix.bits not in BITS:
        raise UsageError(
            f"{matrix.name} needs {matrix.bits} bits in {WHERE}, whose readers take up to "
            f"{BITS[-1]}; {REMEDY}"
        )
    if not (matrix.symmetric or asymmetric):
        raise UsageError(
            f"{matrix.name} has zeros, which vLLM reads in {WHERE} and transformers refuses; "
            f"{AGAIN}, or add --asymmetric"
        )
    return Scheme(matrix.bits, matrix.group, matrix.symmetric)


def _scale(matrix: Plain, dtype: torch.dtype) -> Tensor:
    scale = matrix.scale_in(dtype)
    if scale is None:
        raise UsageError(
            f"{matrix.name}: {dtype}, in which the model computes and {WHERE} has scales, does "
            "not hold its steps exactly; quantize with --dtype bfloat16, or export it with --gptq "
            "or --dense"
        )
    return scale


def _tensors(matrix: Plain, scheme: Scheme, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of one matrix, by their names without its own."""
    codes = matrix.codes()
    tensors = {
        PACKED: pack_stream(codes, scheme.bits),
        SCALE: scale.contiguous(),
        SHAPE: torch.tensor(codes.shape),
    }
    if not scheme.symmetric:
        tensors[ZERO] = pack_stream(matrix.zero.T, scheme.bits).T.contiguous()
    return tensors
