"""A checkpoint as a plain Hugging Face folder, which any tool reads without quip."""

import os
from pathlib import Path

from torch import nn

from quip.checkpoint import SHARD, check_folder, to_dense
from quip.errors import NonFinite, UsageError
from quip.files import check_new, new_folder
from quip.models import load_model


def export_dense(
    folder: str | Path, out: str | Path, *, dtype: str = "auto", overwrite: bool = False
) -> int:
    """Write the model with each W_hat as a dense matrix, and its tokenizer.

    Returns the bytes of the files with weights. `dtype` is float32, bfloat16 or float16; auto is
    what the checkpoint computes in. `out` appears when it is complete; with `overwrite` it
    replaces a folder of this name whole.

    Raises UsageError for an `out` that cannot be, NonFinite for weights beyond the dtype's range,
    and Unavailable for a damaged checkpoint or a disk that does not take the files.
    """
    folder, out = Path(folder), Path(out)
    check_new(out, "OUT", overwrite=overwrite)
    if folder.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"OUT {out}: the checkpoint is in it, and would be lost; name another")
    check_folder(folder)
    loaded = load_model(os.path.join(".", folder), dtype=dtype)  # ./demo is a folder, demo is not
    model = to_dense(loaded.model)
    _check_range(model)
    with new_folder(out, overwrite=overwrite) as partial:
        model.save_pretrained(partial, max_shard_size=SHARD)
        loaded.tokenizer.save_pretrained(partial)
        return sum(path.stat().st_size for path in partial.glob("*.safetensors"))


def _check_range(model: nn.Module) -> None:
    """float16 ends at 65504: what is beyond would become infinite."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise NonFinite(
                f"{name} holds values beyond the range of {parameter.dtype}; "
                "give --dtype bfloat16 or float32"
            )
