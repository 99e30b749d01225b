"""A folder of GPTQ (AutoGPTQ, GPTQModel) as a checkpoint of ours, every weight as it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from torch import Tensor
from transformers import PreTrainedModel

from quip.errors import Unavailable, UnsupportedModel, shown
from quip.packed.checkpoint import Config
from quip.packed.files import DAMAGED, TensorEntry
from quip.packed.gptq.format import (
    CODES,
    FORMATS,
    GROUPS,
    METHOD,
    SCALES,
    WORDS,
    ZEROS,
    Scheme,
)
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
from quip.reading import read_json
from quip.shapes import Within, check_shape

BIAS = "bias"


class Override(TypedDict):
    """What a file says of some of its matrices; more, which changes no weight, may stand there."""

    bits: NotRequired[Literal[2, 3, 4, 8]]
    group_size: NotRequired[Annotated[int, Within(-1)]]


class Words(TypedDict):
    """What a file says of its matrices."""

    bits: Literal[2, 3, 4, 8]
    group_size: Annotated[int, Within(-1)]
    checkpoint_format: NotRequired[str | None]
    format: NotRequired[str | None]
    pack_dtype: NotRequired[str | None]
    dynamic: NotRequired[Annotated[dict[str, Override], Within(0, 1000)] | None]


def import_gptq(
    folder: str | Path, out: str | Path, *, tokenizer: str | None = None, overwrite: bool = False
) -> Imported:
    """Write the model of `folder`, in a format of GPTQ, to `out` as our checkpoint.

    Zeros of version 1 and 2, groups in the order of the inputs or scattered (desc_act), bits and
    groups that differ between matrices. Arguments and errors are those of `import_packed`.
    """
    return import_packed(folder, out, _prepare, tokenizer=tokenizer, overwrite=overwrite)


@dataclass(frozen=True)
class Matrix:
    """A packed matrix of the files, of m outputs and n inputs."""

    name: str
    m: int
    n: int
    scheme: Scheme
    shift: int  # what was taken from zeros
    scattered: bool  # whether the files say the group of each input
    bias: bool  # of the files
    biased: bool  # of the model: one of zeros may stand in files for none

    @property
    def bits(self) -> int:
        return self.scheme.bits

    @property
    def slots(self) -> dict[str, Slot]:
        """Its tensors in the files."""
        slots = _slots(self.scheme, self.m, self.n)
        if not self.scattered:
            del slots[GROUPS]
        if self.bias or self.biased:
            slots[BIAS] = Slot((self.m,), FLOAT)
        return {f"{self.name}.{key}": slot for key, slot in slots.items()}

    def read(self, held: Held) -> tuple[Spec, dict[str, Tensor]]:
        """What it is here, and its tensors by the names of our checkpoints, but for its bias."""

        def stored(key: str) -> Tensor:
            return held[f"{self.name}.{key}"].read()

        if self.bias and not self.biased and bool(stored(BIAS).any()):
            raise UnsupportedModel(
                f"{self.name}.bias is in the files, and the model of this config.json has none; "
                "name another folder"
            )
        bits, groups = self.bits, self.scheme.groups(self.n)
        zero = unpack_stream(stored(ZEROS), bits, self.m).T.contiguous()
        found = Integers(
            bits=bits,
            group=self.scheme.group,
            codes=unpack_stream(stored(CODES).T, bits, self.n),
            zero=(zero.short() + self.shift) % 2**bits,
            scale=stored(SCALES).T,
            place=self._place(stored(GROUPS), groups) if self.scattered else None,
        )
        return found.to_grid(self.name)

    def _place(self, place: Tensor, groups: int) -> Tensor:
        low, high = int(place.min()), int(place.max())
        if low < 0 or high >= groups:
            raise Unavailable(
                f"{self.name}.{GROUPS} names groups from {low} to {high}, of {groups}; {DAMAGED}"
            )
        return place


def _prepare(folder: Path) -> Find:
    words = _words(folder)
    named = words.get("checkpoint_format") or words.get("format") or "gptq"
    if named not in FORMATS or words.get("pack_dtype") not in (None, "int32"):
        packed = words.get("pack_dtype") or "int32"
        raise UnsupportedModel(
            f"its matrices are in the format {shown(named)} in words of {shown(packed)}, and "
            f"{' and '.join(FORMATS)} in words of int32 can be read; save it so by GPTQModel"
        )
    schemes = [_scheme(words["bits"], words["group_size"])]
    for override in (words.get("dynamic") or {}).values():
        own = override.get("bits", words["bits"]), override.get("group_size", words["group_size"])
        schemes += [_scheme(*own)]
    return partial(_matrices, schemes=list(dict.fromkeys(schemes)), shift=FORMATS[named])


def _words(folder: Path) -> Words:
    """What the folder says of its matrices, in config.json or, as older ones do, beside it."""
    found = read_words(folder, Config).get("quantization_config")
    where = "its config.json"
    if found is None and (folder / WORDS).is_file():
        found, where = (
            read_json(folder / WORDS, dict[str, Any], remedy=DAMAGED, called=WORDS),
            WORDS,
        )
    method = METHOD if found and "quant_method" not in found else (found or {}).get("quant_method")
    if found is None or method != METHOD:
        raise UnsupportedModel(
            f"{where} says that it was quantized by {shown(method) if found else 'nothing'}, and "
            f"{METHOD} can be read; name the folder of a model of AutoGPTQ or GPTQModel"
        )
    try:
        check_shape(found, Words)
    except ValueError as error:
        raise UnsupportedModel(
            f"{where} describes its matrices in a way that is not read ({error}); name another "
            "folder"
        ) from error
    return cast(Words, found)


def _scheme(bits: int, group: int) -> Scheme:
    return Scheme(bits, group if group > 0 else None)


def _slots(scheme: Scheme, m: int, n: int) -> dict[str, Slot]:
    """Scales are of float16 as they were written first, and may be of another type."""
    slots = scheme.slots(m, n)
    return slots | {SCALES: Slot(slots[SCALES].shape, FLOAT)}


def _matrices(
    model: PreTrainedModel,
    held: dict[str, TensorEntry],
    *,
    schemes: Sequence[Scheme],
    shift: int,
) -> list[Matrix]:
    found = []
    for name in names_of(held, f".{CODES}"):
        linear = linear_at(model, name)
        m, n = linear.out_features, linear.in_features
        made = Matrix(
            name=name,
            m=m,
            n=n,
            scheme=fitting(
                name, {x: (_slots(x, m, n), min(x.group or n, n)) for x in schemes}, held
            ),
            shift=shift,
            scattered=f"{name}.{GROUPS}" in held,
            bias=f"{name}.{BIAS}" in held,
            biased=linear.bias is not None,
        )
        found.append(made)
    return found
