"""A model of packed lattice matrices in the published layout of QuIP#, every number as it is.

What the layout holds in float16 has to fit it exactly: a scale that would change is refused.
Only norms, embeddings and lm_head are rounded, as published ones are.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quip.codebooks import LATTICES
from quip.errors import NonFinite, UnsupportedModel, UsageError
from quip.kernels.bits import unpack
from quip.packed.checks import is_finite
from quip.packed.layout import Layout
from quip.packed.published import exactly
from quip.packed.quip_sharp.codes import pack_codes
from quip.packed.quip_sharp.format import (
    ARCHITECTURES,
    HEAD,
    IDS,
    Matrix,
    check_spec,
    expected_layout,
    matrices,
    params,
    rescales,
)
from quip.packed.spec import Spec


def published_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of the files.

    Raises UnsupportedModel for another architecture, UsageError where matrices were quantized in
    a way that the layout does not have, and NonFinite for numbers beyond float16.
    """
    spec = _checked(model)
    found: dict[str, Tensor] = {}
    ours = {HEAD} if model.config.tie_word_embeddings else set()
    for matrix in matrices(model):
        tensors = _tensors(matrix, spec)
        found |= {f"{matrix.name}.{key}": x for key, x in tensors.items()}
        ours |= matrix.keys
    rest = {key: x for key, x in model.state_dict().items() if key not in ours}
    return found | {key: _half(key, x) for key, x in rest.items()}


def published_config(model: PreTrainedModel) -> dict[str, Any]:
    """config.json with `quip_params`, and with the names that older tools read.

    transformers 5 has renamed words, in whose place those tools would compute with a default.
    """
    words = json.loads(model.config.to_json_string())
    words.pop("quantization_config", None)
    words |= {"architectures": [type(model).__name__], "quip_params": params(_checked(model))}
    words |= dict.fromkeys(("dtype", "torch_dtype"), "float16")
    rope = dict(words.get("rope_parameters") or {})
    if "rope_theta" in rope:
        words["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        words["rope_scaling"] = rope
    return words


def _checked(model: PreTrainedModel) -> Spec:
    """What all matrices are. Raises unless the layout has a place for each."""
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(
            f"a {kind} has no published layout, {' and '.join(ARCHITECTURES)} have; "
            "export it with --dense"
        )
    found = Layout.of(model)
    spec = _one_of(found.specs)
    check_spec(spec)
    wanted = expected_layout(spec, model.config.num_hidden_layers)
    for members in wanted.stacks:
        if members not in found.stacks:
            raise UsageError(
                f"{', '.join(members)} are not quantized as one, which they are in the published "
                "layout; quantize without --no_fuse"
            )
    for name in wanted.modules:
        if name not in found.modules:
            raise UsageError(f"{name} is not quantized, which it is in the published layout")
    if found != wanted:
        other = sorted({*found.names} - {*wanted.names})
        raise UsageError(f"{', '.join(other)} have no place in the published layout")
    for matrix in matrices(model):
        try:
            matrix.slots(spec)
        except UsageError as error:
            raise UsageError(f"{matrix.name}: {error}") from error
    return spec


def _one_of(specs: Sequence[Spec]) -> Spec:
    if len(specs) > 1:
        kinds = ", ".join(str(dict(spec.codebook)) for spec in specs)
        raise UsageError(
            f"its matrices are of {len(specs)} specifications (codebooks {kinds}), in the "
            "published layout all of one; quantize without --plan, or export it with --dense"
        )
    return specs[0]


def _tensors(matrix: Matrix, spec: Spec) -> dict[str, Tensor]:
    """The published tensors of one matrix, by their names without that of the matrix."""
    name, layer = spec.codebook["name"], matrix.layer
    held, m, n = layer.stored(), layer.out_features, layer.in_features
    bits = LATTICES[name].bits
    tensors = {
        "Qidxs": pack_codes(unpack(held["codes"], 8 * bits, n // 8), m, n, bits),
        "SU": held["signs_in"],
        "SV": held["signs_out"],
        "Wscale": _scale(matrix.name, held["scale"]).reshape(()),
        "codebook_id": torch.tensor(IDS[name]),
    }
    if "scales" in held:
        tensors["fuse_scales"] = _scale(matrix.name, held["scales"])
    if rescales(spec):
        tensors["scaleWH"] = held["rescale"].float()  # as float16 it might not fit
    if matrix.biases:
        tensors["bias"] = _half(f"{matrix.name}.bias", torch.cat(matrix.biases))
    return tensors


def _scale(name: str, scale: Tensor) -> Tensor:
    half = exactly(scale, torch.float16)
    if half is None:
        raise UsageError(
            f"{name}: float16, in which the published layout has scales, does not hold "
            f"{scale.tolist()} exactly; quantize the model again, or export it with --dense"
        )
    return half


def _half(name: str, x: Tensor) -> Tensor:
    half = x.to(torch.float16)
    if not is_finite(half):
        raise NonFinite(
            f"{name} holds values beyond the range of float16, which the published layout has; "
            "export it with --dense --dtype bfloat16"
        )
    return half
