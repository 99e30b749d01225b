"""What a folder of compressed-tensors holds of a matrix in format pack-quantized, and its words.

With signed codes q and zeros z of b bits, and groups of columns that share a scale,

    W_hat[i, j] = weight_scale[i, group] (q[i, j] - z[i, group]).

`weight_packed` has q + 2^(b-1), each row one stream of bits (quip.packed.streams).
`weight_zero_point` has z + 2^(b-1), each column one; of a symmetric scheme, z is 0 and not stored.
"""

from dataclasses import dataclass
from typing import Any

from quip.packed.published import FLOAT, Slot
from quip.packed.streams import stream_words

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
ZERO = "weight_zero_point"
BITS = range(2, 9)  # that its readers take
INTEGER, LONG = ("I32",), ("I64",)


@dataclass(frozen=True)
class Scheme:
    """How the matrices of one of its `config_groups` are stored."""

    bits: int
    group: int | None  # columns that share a scale; None: all of a row
    symmetric: bool

    def to_json(self) -> dict[str, Any]:
        """The words of `weights`."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group is None else "group",
            "group_size": self.group,
        }

    def groups(self, n: int) -> int:
        """The groups of n columns, which are a multiple of `group`."""
        return 1 if self.group is None else n // self.group

    def slots(self, m: int, n: int) -> dict[str, Slot]:
        """Every tensor of an m x n matrix but its bias, by its name without that of the matrix."""
        groups = self.groups(n)
        slots = {
            PACKED: Slot((m, stream_words(n, self.bits)), INTEGER),
            SCALE: Slot((m, groups), FLOAT),
            SHAPE: Slot((2,), LONG),
        }
        zero = Slot((stream_words(m, self.bits), groups), INTEGER)
        return slots if self.symmetric else slots | {ZERO: zero}


def config_words(groups: dict[Scheme, list[str]], ignored: list[str]) -> dict[str, Any]:
    """`quantization_config`, by the targets of each scheme: names of modules, or of their class."""
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": scheme.to_json()}
            for i, (scheme, targets) in enumerate(groups.items())
        },
    }
