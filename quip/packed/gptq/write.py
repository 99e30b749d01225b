"""A model of packed grids as tensors of GPTQ, checkpoint format gptq, every number as it is."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quip.errors import UsageError
from quip.packed.gptq.format import CODES, FORMATS, GROUPS, MULTIPLE, SCALES, ZEROS, Scheme
from quip.packed.plain import AGAIN, REMEDY, Plain, left_dense, plain_matrices, with_packed
from quip.packed.streams import pack_stream

WHERE, VERSION = "GPTQ", "gptq"
BITS = (4, 8)  # that vLLM takes, and any other reader


def gptq_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor of the files, and `quantization_config`.

    Raises UsageError for a matrix that the format has no place for, and for a model whose matrices
    are not all of one kind.
    """
    found = plain_matrices(model, WHERE)
    scales = {matrix.name: _checked(matrix) for matrix in found}
    head = model.get_output_embeddings()
    dense = [name for name in left_dense(model) if model.get_submodule(name) is not head]
    if dense:
        raise UsageError(
            f"{dense[0]} is not quantized, and GPTQ has all matrices of a block so; "
            f"export it with --compressed-tensors, or {AGAIN}"
        )
    schemes = {Scheme(matrix.bits, matrix.group) for matrix in found}
    if len(schemes) > 1:
        kinds = [f"{x.bits} bits in groups of {x.group or 'whole rows'}" for x in schemes]
        raise UsageError(
            f"its matrices are of {' and of '.join(sorted(kinds))}, and GPTQ has one kind; "
            "export it with --compressed-tensors, or quantize without --plan"
        )
    (scheme,) = schemes
    packed = {matrix.name: _tensors(matrix, scheme, scales[matrix.name]) for matrix in found}
    return with_packed(model, packed), scheme.to_json()


def _checked(matrix: Plain) -> Tensor:
    """The scales in float16. Raises UsageError where the matrix has no place."""
    m, n = matrix.layer.out_features, matrix.layer.in_features
    if not matrix.symmetric:
        raise UsageError(f"{matrix.name} has zeros, which readers of GPTQ do not take; {REMEDY}")
    if matrix.bits not in BITS:
        raise UsageError(
            f"{matrix.name} needs {matrix.bits} bits, and readers of GPTQ take "
            f"{' and '.join(map(str, BITS))}; export it with --compressed-tensors, or {AGAIN}"
        )
    for size, what in ((m, "outputs"), (n, "inputs")):
        if size % MULTIPLE:
            raise UsageError(
                f"{matrix.name} has {size} {what}, no multiple of {MULTIPLE}, as GPTQ needs them; "
                "export it with --compressed-tensors, or with --dense"
            )
    scale = matrix.scale_in(torch.float16)
    if scale is None:
        raise UsageError(
            f"{matrix.name}: float16, in which GPTQ has scales, does not hold its steps exactly; "
            "export it with --compressed-tensors"
        )
    return scale


def _tensors(matrix: Plain, scheme: Scheme, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of one matrix, by their names without its own."""
    m, n, bits = matrix.layer.out_features, matrix.layer.in_features, scheme.bits
    zero = 2 ** (bits - 1) - FORMATS[VERSION]
    zeros = torch.full((scheme.groups(n), m), zero)
    return {
        CODES: pack_stream(matrix.codes(), bits).T.contiguous(),
        ZEROS: pack_stream(zeros, bits),
        SCALES: scale.T.contiguous(),
        GROUPS: torch.arange(n, dtype=torch.int32) // (scheme.group or n),
    }
