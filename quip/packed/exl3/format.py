"""What a folder in the layout of EXL3 holds: its matrices, and their tensors.

config.json has a quantization_config of the method exl3; what is packed the files say. With the
decoded weights W~ as inputs x outputs and H 128 x 128 of Sylvester over sqrt(128),

    W = diag(suh) (I x H) W~ (I x H) diag(svh),

which are the vectors of a Hadamard transform of ours in blocks of 128.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quip.errors import Unavailable, UnsupportedModel
from quip.kernels.bits import pack
from quip.packed.exl3.codes import BITS, ORDER, TILE, balanced, unpack_codes, unpack_signs
from quip.packed.files import DAMAGED, TensorEntry
from quip.packed.importing import linear_at, names_of
from quip.packed.published import FLOAT, Slot
from quip.packed.spec import Spec

METHOD = "exl3"
MARKERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}  # the multiplier that a tensor of the name holds
UNMARKED = "3inst"
STATES = 16  # bits of a state
BLOCK = 128
CODES = ".trellis"
VECTORS = {"suh": "signs_in", "svh": "signs_out"}  # float16; or as bits, without the h


@dataclass(frozen=True)
class Matrix:
    """A packed matrix of the files, of m outputs and n inputs."""

    name: str
    m: int
    n: int
    bits: int  # per weight
    code: str
    packed: tuple[str, ...]  # the vectors that are bits
    bias: bool

    @property
    def spec(self) -> Spec:
        """What it is here."""
        codebook = {
            "kind": "trellis",
            "code": self.code,
            "bits": self.bits,
            "states": STATES,
            "rows": TILE,
            "columns": TILE,
            "group": None,
            "order": ORDER,
            "own": False,
        }
        return Spec.from_json(codebook, [{"kind": "hadamard", "block": BLOCK}])

    @property
    def slots(self) -> dict[str, Slot]:
        """Its tensors in the files."""
        found = {"trellis": Slot((self.n // TILE, self.m // TILE, TILE * self.bits), ("I16",))}
        for key, size in (("suh", self.n), ("svh", self.m)):
            if key in self.packed:
                found[key[:-1]] = Slot((size // 16,), ("I16",))
            else:
                found[key] = Slot((size,), ("F16",))
        if self.code != UNMARKED:
            found[self.code] = Slot((), ("I32",))
        if self.bias:
            found["bias"] = Slot((self.m,), FLOAT)
        return {f"{self.name}.{key}": slot for key, slot in found.items()}

    def read(self, held: Mapping[str, TensorEntry]) -> tuple[Spec, dict[str, Tensor]]:
        """What it is, and its tensors by the names of our checkpoints, but for its bias.

        A power of two goes from suh, which holds the size of the weights, to the scale of the code.
        """

        def stored(key: str) -> Tensor:
            return held[f"{self.name}.{key}"].read()

        if self.code != UNMARKED:
            check_marker(self.name, int(stored(self.code)), self.code)
        vectors = {
            ours: unpack_signs(stored(theirs[:-1])) if theirs in self.packed else stored(theirs)
            for theirs, ours in VECTORS.items()
        }
        scale, vectors["signs_in"] = balanced(vectors["signs_in"])
        codes = pack(unpack_codes(stored("trellis")), self.bits)
        return self.spec, {"codes": codes, "scale": torch.tensor([scale]), **vectors}


def matrices(model: nn.Module, held: Mapping[str, TensorEntry]) -> list[Matrix]:
    """The packed matrices of the files, each of which is an nn.Linear of the model.

    Raises UnsupportedModel for what the model has not, and for sizes and bits that cannot be read.
    """
    return [_matrix(model, name, held) for name in names_of(held, CODES)]


def _matrix(model: nn.Module, name: str, held: Mapping[str, TensorEntry]) -> Matrix:
    linear, words = linear_at(model, name), held[f"{name}{CODES}"]
    m, n = linear.out_features, linear.in_features
    for size, what in ((m, "outputs"), (n, "inputs")):
        if size % BLOCK:
            raise UnsupportedModel(
                f"{name}: its {size} {what} are no multiple of {BLOCK}, to which the files fill "
                "them up with zeros; name another folder"
            )
    width = words.shape[-1] if len(words.shape) == 3 else 0
    if width % TILE == TILE // 2:
        raise UnsupportedModel(
            f"{name}: {width / TILE:g} bits a weight, of steps that alternate, are not read; name "
            "the folder of a model of whole bits"
        )
    if width % TILE or width // TILE not in BITS:
        raise Unavailable(
            f"{name}{CODES}: {list(words.shape)} words, of a matrix of {m} x {n} at 1 to 8 bits "
            f"[{n // TILE}, {m // TILE}, 16 to 128]; {DAMAGED}"
        )
    marked = [code for code in MARKERS if f"{name}.{code}" in held]
    if len(marked) > 1:
        raise Unavailable(f"{name} has the markers of two codes, {' and '.join(marked)}; {DAMAGED}")
    packed = tuple(
        key for key in VECTORS if f"{name}.{key[:-1]}" in held and f"{name}.{key}" not in held
    )
    return Matrix(
        name=name,
        m=m,
        n=n,
        bits=width // TILE,
        code=marked[0] if marked else UNMARKED,
        packed=packed,
        bias=linear.bias is not None,
    )


def check_marker(name: str, value: int, code: str) -> None:
    """Raise UnsupportedModel for a multiplier other than that of the code."""
    value, known = value & 0xFFFFFFFF, MARKERS[code]  # as a file has it, it may be negative
    if value != known:
        raise UnsupportedModel(
            f"{name}.{code} names a code of multiplier {value:#x}, and {known:#x} can be read; "
            "name another folder"
        )
