"""A folder in the layout of EXL3 as a checkpoint of ours, every code and every scale as it was."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from quip.errors import UnsupportedModel, shown
from quip.packed.exl3.format import METHOD, matrices
from quip.packed.importing import Find, import_packed
from quip.packed.published import read_words


class Words(TypedDict):
    """What has to be known of a config.json before transformers reads it."""

    quantization_config: NotRequired[dict[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was taken in."""

    matrices: int
    codes: tuple[str, ...]
    bits: float  # per weight of the matrices, codes alone
    file_bytes: int  # of the checkpoint's weights


def import_exl3(
    folder: str | Path, out: str | Path, *, tokenizer: str | None = None, overwrite: bool = False
) -> Imported:
    """Write the model of `folder`, in the layout of EXL3, to `out` as our checkpoint.

    Arguments and errors are those of `import_packed`.
    """
    made = import_packed(folder, out, _prepare, tokenizer=tokenizer, overwrite=overwrite)
    codes: Any = made.found
    return Imported(
        matrices=made.matrices,
        codes=tuple(sorted({matrix.code for matrix in codes})),
        bits=made.bits,
        file_bytes=made.file_bytes,
    )


def _prepare(folder: Path) -> Find:
    words = read_words(folder, Words).get("quantization_config")
    if words is None or words.get("quant_method") != METHOD:
        method = shown(words.get("quant_method")) if words else "nothing"
        raise UnsupportedModel(
            f"its config.json says that it was quantized by {method}, and {METHOD} can be read; "
            "name the folder of a model that exllamav3 converted"
        )
    return matrices
