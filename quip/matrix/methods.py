"""The papers' tables in words: methods, rotations, and recipes by name. No torch.

`build` turns the words into functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quip.codebooks.names import LATTICES


@dataclass(frozen=True)
class Method:
    """One row of the papers' method table."""

    order: str  # a function of quip.matrix.order
    feedback: str  # a function of quip.matrix.feedback
    passes: int  # greedy passes by default
    swept_passes: int  # passes that the sweep itself already is
    title: str


METHODS = {
    "nearest": Method("natural", "none", 0, 0, "each weight to its nearest level"),
    "gptq": Method("natural", "ldl", 0, 0, "OPTQ (GPTQ): LDLQ from first column to last"),
    "ldlq": Method("backwards", "ldl", 0, 0, "QuIP: optimal linear feedback"),
    "ldlqRG": Method("largest_first", "ldl", 10, 0, "QuIP-RG: LDLQ by diag(H), then greedy"),
    "allbal": Method("largest_first", "coordinate", 10, 1, "greedy updates alone"),
    "ldlbal_admm": Method("largest_first", "admm", 0, 0, "QuIP Algorithm 5, bounded feedback"),
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
UNROTATED = "none"  # where a codebook would rotate by default
UNPERMUTED = Rotation(draw="KroneckerDraw", options={"blocked": True, "permute": False})
EXTRAS = (ROTATIONS["blocked"], ROTATIONS["kronecker"], UNPERMUTED)  # by --pre_proj_extra


@dataclass(frozen=True, kw_only=True)
class Named:
    """A recipe by name: the flags that it stands for, and those of a run that go with them."""

    title: str
    flags: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def every(self) -> dict[str, Any]:
        """All flags of `quip run` that it stands for."""
        return self.flags | self.run


# Dimensions and bits per value of the rows of GPTVQ's Tables 2 and 9.
GPTVQ = [(dim, bits) for bits in (2.125, 2.25, 3.125, 4.125) for dim in (1, 2)]
GPTVQ += [(4, bits) for bits in (2.125, 2.25)]
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
    **{
        f"gptvq-{dim}d-{bits}": Named(
            title=f"GPTVQ: {dim} weights to one of {2 ** (dim * int(bits))} centroids, {bits} bits",
            flags={
                "wbits": int(bits),
                "quant": "gptq",
                "codebook": "vq",
                "vq_dim": dim,
                "bits_per_value": bits,
            },
        )
        for dim, bits in GPTVQ
    },
    **{
        f"trellis-{bits}bit{fast}": Named(
            title=f"QTIP's trellis with a learned code of 2^{states} states, {bits} bits",
            flags={
                "wbits": bits,
                "quant": "ldlq",
                "codebook": "trellis",
                "trellis_states": states,
                **({"npasses": 0} if fast else {}),
            },
        )
        for bits, states, fast in ((2, 12, ""), (3, 12, ""), (4, 12, ""), (2, 10, "-fast"))
    },
    **{
        f"best-{bits}bit": Named(
            title=f"a trellis code by all that the loss feels, and targets, {bits} bits",
            flags={
                "wbits": bits,
                "quant": "ldlq",
                "codebook": "trellis",
                "trellis_states": 12,
                "pre_rescale_out": True,
            },
            run={"token_weights": "fisher", "target_shrink": "auto"},
        )
        for bits in (2, 3, 4)
    },
}
