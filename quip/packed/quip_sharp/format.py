"""What a folder in the published layout of QuIP# holds: its words, its matrices, their tensors.

config.json has `quip_params`, and each block of a Llama or Mistral four matrices: q, k and v
stacked, o, up and gate stacked, down. With Omega of
quip.kernels.hadamard and W~ the decoded weights,

    W_hat = diag(fuse_scales of its rows) diag(SV) Omega_m Wscale W~ Omega_n^T diag(SU),

and scaleWH, where there is one, divides the inputs: a Rescale and a Hadamard of ours.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from quip.codebooks import LATTICES
from quip.errors import QuipError, UnsupportedModel, UsageError, shown
from quip.packed.layout import Layout
from quip.packed.linear import QuantizedLinear
from quip.packed.published import FLOAT, Slot
from quip.packed.quip_sharp.codes import check_size, words_per_row
from quip.packed.spec import Spec
from quip.packed.stack import Stack

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
IDS = {"E8P12": 7, "E8P12RVQ3B": 18, "E8P12RVQ4B": 17}
VERSIONS = {"E8P12": 1, "E8P12RVQ3B": 0, "E8P12RVQ4B": 1}
FIXED = {
    "codesz": 8,
    "fused": True,
    "idx_dtype": "torch.int64",
    "lora_rank": 0,
    "model_version": 1,
    "outlier_channel_split": False,
}
MATRICES = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.upgate_proj": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
# The first that divides n is the K of Omega_n; what is left has to be a power of two.
ORDERS = (172, 156, 140, 124, 116, 108, 60, 52, 36, 28, 20, 12)
HEAD = "lm_head.weight"
INTEGER, HALF = ("I64",), ("F16",)


@dataclass(frozen=True)
class Matrix:
    """A packed matrix of a model, by its name in published files and those of its members here."""

    name: str
    members: tuple[str, ...]
    layer: QuantizedLinear
    biases: tuple[Tensor, ...]  # of the members; none where they have none

    @property
    def prefix(self) -> str:
        """What the names of its tensors in our checkpoints start with."""
        return _prefix(self.members)

    @property
    def rows(self) -> list[int]:
        """The number of rows of each member."""
        layer = self.layer
        return list(layer.sizes) if isinstance(layer, Stack) else [layer.out_features]

    @property
    def keys(self) -> set[str]:
        """The names of all its tensors in our checkpoints, biases among them."""
        biases = {f"{member}.bias" for member in self.members} if self.biases else set()
        return biases | {f"{self.prefix}.{key}" for key in self.layer.stored()}

    def slots(self, spec: Spec) -> dict[str, Slot]:
        """Its tensors in published files."""
        m, n = self.layer.out_features, self.layer.in_features
        return slots(m, n, spec, members=len(self.members), bias=bool(self.biases))


def names(blocks: int) -> dict[str, tuple[str, ...]]:
    """Every matrix of a model of so many blocks, and its members."""
    starts = [f"model.layers.{i}." for i in range(blocks)]
    return {
        start + name: tuple(start + member for member in members)
        for start in starts
        for name, members in MATRICES.items()
    }


def expected_layout(spec: Spec, blocks: int) -> Layout:
    """The layout, for `QuipConfig`, of a model of so many blocks that has all their matrices."""
    found = sorted(names(blocks).values())
    alone = [members[0] for members in found if len(members) == 1]
    together = [members for members in found if len(members) > 1]
    return Layout(dict.fromkeys(alone, spec), dict.fromkeys(together, spec))


def matrices(model: PreTrainedModel) -> list[Matrix]:
    """The packed matrices of a model that has the layout."""
    found = []
    for name, members in names(model.config.num_hidden_layers).items():
        layer: Any = model.get_submodule(_prefix(members))
        biases: list[Any] = [model.get_submodule(member).bias for member in members]
        found.append(Matrix(name, members, layer, () if None in biases else tuple(biases)))
    return found


def slots(m: int, n: int, spec: Spec, *, members: int, bias: bool) -> dict[str, Slot]:
    """Every tensor of an m x n matrix of so many members. Raises UsageError for other sizes."""
    check_size(m, n)
    for size in (m, n):
        check_width(size)
    words = words_per_row(n, LATTICES[spec.codebook["name"]].bits)
    found = {
        "Qidxs": Slot((m, words), INTEGER),
        "SU": Slot((n,), HALF),
        "SV": Slot((m,), HALF),
        "Wscale": Slot((), FLOAT),
        "codebook_id": Slot((), INTEGER),
    }
    if members > 1:
        found["fuse_scales"] = Slot((members,), FLOAT)
    if rescales(spec):
        found["scaleWH"] = Slot((n,), FLOAT)
    if bias:
        found["bias"] = Slot((m,), FLOAT)
    return found


def check_width(n: int) -> None:
    """Raises UsageError where readers of published files find no Omega_n, or another than ours."""
    rest = n // next((order for order in ORDERS if n % order == 0), 1)
    if rest & (rest - 1):
        raise UsageError(
            f"the published layout of QuIP# has no Hadamard matrix of width {n}; "
            "keep the checkpoint as it is, or export it with --dense"
        )


def rescales(spec: Spec) -> bool:
    return any(part["kind"] == "rescale" for part in spec.transforms)


def params(spec: Spec) -> dict[str, Any]:
    """`quip_params` of matrices of this specification, which `check_spec` let pass."""
    name, ratio = spec.codebook["name"], spec.codebook["ratio"]
    row = LATTICES[name]
    return FIXED | {
        "codebook": name,
        "codebook_version": VERSIONS[name],
        "packsz": 8 // row.bits if 8 % row.bits == 0 else 8 / row.bits,
        "rescale_WH": rescales(spec),
        "resid_scale_override": -1 if ratio == row.ratio else ratio,
    }


def spec_of(words: Mapping[str, Any]) -> Spec:
    """What `quip_params` says. Raises UnsupportedModel for whatever has another layout."""
    name, version = words.get("codebook"), words.get("codebook_version")
    if not (isinstance(name, str) and name in IDS):
        raise UnsupportedModel(
            f"its codebook is {shown(name)}, and {', '.join(IDS)} can be read; name another folder"
        )
    if version != VERSIONS[name]:
        raise UnsupportedModel(
            f"its codebook is {name} of version {shown(version)}, and version {VERSIONS[name]} can "
            "be read; download the model anew, or quantize it"
        )
    for key, value in FIXED.items():
        if words.get(key, value) != value:
            raise UnsupportedModel(
                f"its quip_params have {key} {shown(words[key])}, and only {value!r} can be read; "
                "name another folder, or quantize the model"
            )
    row, ratio = LATTICES[name], words.get("resid_scale_override", -1)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not math.isfinite(ratio):
        raise QuipError(f"resid_scale_override of its quip_params is {shown(ratio)}, not a number")
    if row.ratio is not None:
        ratio = float(ratio) if ratio > 0 else row.ratio
    codebook = {"kind": "lattice", "name": name, "ratio": row.ratio and ratio, "group": None}
    rescale = [{"kind": "rescale"}] if words.get("rescale_WH") else []
    return Spec.from_json(codebook, [*rescale, {"kind": "hadamard", "block": None}])


def check_spec(spec: Spec) -> None:
    """Raises UsageError, with a remedy, for matrices that the layout cannot express."""
    book, remedy = spec.codebook, "quantize with --codebook E8P12 --range tensor"
    if book["kind"] != "lattice":
        raise UsageError(
            f"its codebook is a {book['kind']}, and the published layout has lattices; {remedy}"
        )
    if book["group"] is not None:
        raise UsageError(
            f"its matrices have a scale for every {book['group']} columns, and in the published "
            "layout one; quantize with --range tensor"
        )
    kinds = [part["kind"] for part in spec.transforms]
    if kinds not in (["hadamard"], ["rescale", "hadamard"]):
        raise UsageError(
            f"its matrices are transformed by {' and '.join(kinds) or 'nothing'}, in the published "
            "layout by one Hadamard matrix; quantize with --rotation hadamard"
        )
    if (block := spec.transforms[-1]["block"]) is not None:
        raise UsageError(
            f"its Hadamard matrices have blocks of {block}, in the published layout one block; "
            "quantize without --hadamard_block"
        )


def _prefix(members: tuple[str, ...]) -> str:
    return f"{members[0]}.stack" if len(members) > 1 else members[0]
