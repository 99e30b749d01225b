"""The papers' tables in words: methods, rotations, and recipes by name. No torch.

`build` turns the words into functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quip.codebooks.names import LATTICES


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the papers' method table."""

    title: str
    order: str  # a function of quip.matrix.order
    feedback: str  # a function of quip.matrix.feedback
    passes: int = 0  # greedy passes by default
    swept_passes: int = 0  # passes that the sweep itself already is


METHODS = {
    "nearest": Method(title="each weight to its nearest level", order="natural", feedback="none"),
    "gptq": Method(
        title="OPTQ (GPTQ): LDLQ from first column to last", order="natural", feedback="ldl"
    ),
    "ldlq": Method(title="QuIP: optimal linear feedback", order="backwards", feedback="ldl"),
    "ldlqRG": Method(
        title="QuIP-RG: LDLQ by diag(H), then greedy",
        order="largest_first",
        feedback="ldl",
        passes=10,
    ),
    "allbal": Method(
        title="greedy updates alone",
        order="largest_first",
        feedback="coordinate",
        passes=10,
        swept_passes=1,
    ),
    "ldlbal_admm": Method(
        title="QuIP Algorithm 5, bounded feedback", order="largest_first", feedback="admm"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """A rotation by name: the draw in quip.transforms, its options, and the flags it takes."""

    draw: str
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: Mapping[str, str] = field(default_factory=dict)  # options that are flags: by name


ROTATIONS = {
    "kronecker": Rotation(draw="KroneckerDraw"),
    "blocked": Rotation(draw="KroneckerDraw", options={"blocked": True}),
    "hadamard": Rotation(draw="HadamardDraw", takes={"block": "hadamard_block"}),
}
UNPERMUTED = Rotation(draw="KroneckerDraw", options={"blocked": True, "permute": False})
EXTRAS = (ROTATIONS["blocked"], ROTATIONS["kronecker"], UNPERMUTED)  # by --pre_proj_extra


@dataclass(frozen=True, kw_only=True)
class Named:
    """A recipe by name: the flags that it stands for."""

    title: str
    flags: dict[str, Any]


RECIPES = {
    **{
        f"quip-{bits}bit": Named(
            title=f"QuIP: LDLQ with incoherence processing, {bits} bits",
            flags={"wbits": bits, "quant": "ldlq", "incoh_processing": True},
        )
        for bits in (2, 3, 4)
    },
    **{
        f"quip-sharp-{row.bits}bit": Named(
            title=f"QuIP#: block LDLQ with {name} after a Hadamard transform, {row.bits} bits",
            flags={"wbits": row.bits, "quant": "ldlq", "codebook": name},
        )
        for name, row in LATTICES.items()
    },
}
