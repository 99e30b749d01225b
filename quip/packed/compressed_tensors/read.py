"""A folder of compressed-tensors, pack-quantized, as a checkpoint of ours, every weight as it was.

Up to version 0.17 a word held whole codes only (of 3 bits ten, 2 bits unused), since 0.18 a row is
one stream of bits. The shapes of the tensors tell which, and both are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quip.errors import Unavailable, UnsupportedModel, shown
from quip.packed.checkpoint import Config
from quip.packed.compressed_tensors.format import (
    FORMAT,
    INTEGER,
    METHOD,
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    Scheme,
)
from quip.packed.files import DAMAGED, TensorEntry
from quip.packed.importing import (
    Find,
    Held,
    Imported,
    fitting,
    import_packed,
    linear_at,
    names_of,
)
from quip.packed.integers import Integers
from quip.packed.published import FLOAT, Slot, read_words
from quip.packed.spec import Spec
from quip.packed.streams import unpack_stream
from quip.shapes import Within, check_shape

PLACE = "weight_g_idx"  # the group of each input, where inputs were sorted by their size
BIAS = "bias"
REMEDY = "name the folder of a model whose weights alone are quantized, in integers"


class Weights(TypedDict):
    """What a file says of the weights of a group of matrices."""

    num_bits: Annotated[int, Within(2, 8)]
    type: NotRequired[Literal["int"]]
    symmetric: NotRequired[bool]
    strategy: NotRequired[Literal["group", "channel"] | None]
    group_size: NotRequired[Annotated[int, Within(-1)] | None]


class Group(TypedDict):
    """A group of matrices of one scheme."""

    weights: Weights
    format: NotRequired[Literal["pack-quantized"] | None]
    input_activations: NotRequired[None]
    output_activations: NotRequired[None]


class Words(TypedDict):
    """What a file says of its matrices."""

    format: Literal["pack-quantized", "mixed-precision"]
    config_groups: Annotated[dict[str, Group], Within(1, 1000)]
    kv_cache_scheme: NotRequired[None]
    transform_config: NotRequired[dict[str, Any] | None]
    sparsity_config: NotRequired[dict[str, Any] | None]


@dataclass(frozen=True)
class Layout(Scheme):
    """A scheme, and how its codes lie in words."""

    dense: bool  # one stream of bits, without waste

    def words(self, count: int) -> int:
        """The words of so many codes."""
        return -(-count * self.bits // 32) if self.dense else -(-count // (32 // self.bits))

    def slots(self, m: int, n: int) -> dict[str, Slot]:
        """Every tensor of an m x n matrix but its bias."""
        slots = super().slots(m, n)
        slots[PACKED] = Slot((m, self.words(n)), INTEGER)
        if ZERO in slots:
            slots[ZERO] = Slot((self.words(m), self.groups(n)), INTEGER)
        return slots

    def unpack(self, words: Tensor, count: int) -> Tensor:
        """Each row of words as codes."""
        if self.dense:
            return unpack_stream(words, self.bits, count)
        held = 32 // self.bits
        shifts = torch.arange(held) * self.bits
        codes = (words.unsqueeze(-1) >> shifts) & (2**self.bits - 1)
        return codes.flatten(-2)[..., :count].to(torch.uint8)


def import_compressed_tensors(
    folder: str | Path, out: str | Path, *, tokenizer: str | None = None, overwrite: bool = False
) -> Imported:
    """Write the model of `folder`, in compressed-tensors' pack-quantized, to `out`.

    Symmetric and asymmetric, of 2 to 8 bits, in groups or a row at once, by several schemes; groups
    in the order of the inputs or scattered (actorder). Arguments and errors are those of
    `import_packed`.
    """
    return import_packed(folder, out, _prepare, tokenizer=tokenizer, overwrite=overwrite)


@dataclass(frozen=True)
class Matrix:
    """A packed matrix of the files, of m outputs and n inputs."""

    name: str
    m: int
    n: int
    layout: Layout
    scattered: bool  # whether the files say the group of each input
    biased: bool

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def slots(self) -> dict[str, Slot]:
        """Its tensors in the files."""
        slots = self.layout.slots(self.m, self.n)
        if self.scattered:
            slots[PLACE] = Slot((self.n,), INTEGER)
        if self.biased:
            slots[BIAS] = Slot((self.m,), FLOAT)
        return {f"{self.name}.{key}": slot for key, slot in slots.items()}

    def read(self, held: Held) -> tuple[Spec, dict[str, Tensor]]:
        """What it is here, and its tensors by the names of our checkpoints, but for its bias."""

        def stored(key: str) -> Tensor:
            return held[f"{self.name}.{key}"].read()

        if (shape := stored(SHAPE).tolist()) != [self.m, self.n]:
            raise Unavailable(
                f"{self.name}.{SHAPE} says {shape}, of a matrix of {[self.m, self.n]}; {DAMAGED}"
            )
        scale, layout = stored(SCALE), self.layout
        if layout.symmetric:
            zero = torch.full(scale.shape, 2 ** (self.bits - 1), dtype=torch.uint8)
        else:
            zero = layout.unpack(stored(ZERO).T, self.m).T
        found = Integers(
            bits=self.bits,
            group=layout.group,
            codes=layout.unpack(stored(PACKED), self.n),
            zero=zero,
            scale=scale,
            place=stored(PLACE) if self.scattered else None,
        )
        return found.to_grid(self.name)


def _prepare(folder: Path) -> Find:
    found = read_words(folder, Config).get("quantization_config")
    if found is None or found.get("quant_method") != METHOD:
        method = shown(found.get("quant_method")) if found else "nothing"
        raise UnsupportedModel(
            f"its config.json says that it was quantized by {method}, and {METHOD} can be read; "
            "name the folder of a model of llm-compressor"
        )
    words: Any = found
    try:
        check_shape(words, Words)
        _check_extras(words)
    except ValueError as error:
        raise UnsupportedModel(
            f"its config.json describes matrices that are not read as {FORMAT} ({error}); {REMEDY}"
        ) from error
    schemes = [_scheme(group["weights"]) for group in words["config_groups"].values()]
    return partial(_matrices, schemes=list(dict.fromkeys(schemes)))


def _check_extras(words: Words) -> None:
    """Raise ValueError for what changes a weight or an input beside the packed codes."""
    if (words.get("transform_config") or {}).get("config_groups"):
        raise ValueError(f"transform_config is {shown(words.get('transform_config'))}")
    sparse = (words.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise ValueError(f"sparsity_config.format is {shown(sparse)}")


def _scheme(words: Weights) -> Scheme:
    group = words.get("group_size") or -1
    return Scheme(words["num_bits"], group if group > 0 else None, words.get("symmetric", True))


def _matrices(
    model: PreTrainedModel, held: dict[str, TensorEntry], *, schemes: Sequence[Scheme]
) -> list[Matrix]:
    layouts = [
        Layout(x.bits, x.group, x.symmetric, dense) for x in schemes for dense in (True, False)
    ]
    found = []
    for name in names_of(held, f".{PACKED}"):
        linear = linear_at(model, name)
        m, n = linear.out_features, linear.in_features
        whole = [x for x in layouts if x.group is None or n % x.group == 0]
        if not whole:
            raise UnsupportedModel(
                f"{name}: its {n} inputs are in no whole groups of {schemes[0].group}, as "
                "config.json has them; name another folder"
            )
        zeros = f"{name}.{ZERO}" in held
        fit = [x for x in whole if x.symmetric != zeros] or whole
        choices = {x: (x.slots(m, n), x.group or n) for x in fit}
        scattered = f"{name}.{PLACE}" in held
        layout = fitting(name, choices, held)
        found.append(Matrix(name, m, n, layout, scattered, linear.bias is not None))
    return found
