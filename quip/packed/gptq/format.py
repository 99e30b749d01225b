"""What a folder of GPTQ holds of a matrix, and its words.

With unsigned codes q and zeros z of b bits, and g_idx the group of each input,

    W_hat[i, j] = scales[g_idx[j], i] (q[i, j] - z[g_idx[j], i]).

Every tensor lies transposed. A column of `qweight` is a row of codes as one stream of bits, and a
row of `qzeros` the zeros of a group (quip.packed.streams); in checkpoint format gptq, of version 1,
what stands there is z - 1 modulo 2^b.
"""

from dataclasses import dataclass
from typing import Any

from quip.packed.published import Slot
from quip.packed.streams import stream_words

METHOD = "gptq"
FORMATS = {"gptq": 1, "gptq_v2": 0}  # by checkpoint_format: what is taken from a zero
CODES, ZEROS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"
WORDS = "quantize_config.json"  # the same words beside config.json, for older readers
MULTIPLE = 32  # of rows and columns
INTEGER, HALF = ("I32",), ("F16",)


@dataclass(frozen=True)
class Scheme:
    """How all matrices of a folder are stored."""

    bits: int
    group: int | None  # columns that share a scale; None: all of a row

    def to_json(self) -> dict[str, Any]:
        """`quantization_config` of symmetric matrices in format gptq."""
        return {
            "quant_method": METHOD,
            "bits": self.bits,
            "group_size": self.group or -1,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
        }

    def groups(self, n: int) -> int:
        """The groups of n columns; the last one may be short."""
        return 1 if self.group is None else -(-n // self.group)

    def slots(self, m: int, n: int) -> dict[str, Slot]:
        """Every tensor of an m x n matrix but its bias, by its name without that of the matrix."""
        groups = self.groups(n)
        return {
            CODES: Slot((stream_words(n, self.bits), m), INTEGER),
            ZEROS: Slot((groups, stream_words(m, self.bits)), INTEGER),
            SCALES: Slot((groups, m), HALF),
            GROUPS: Slot((n,), INTEGER),
        }
