"""A checkpoint with what belongs beside its weights: run.json, the card and the plot."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from quip.errors import QuipError
from quip.files import replacing
from quip.jobs.report.card import model_card
from quip.jobs.report.folder import as_json, read_report
from quip.jobs.report.plots import write_plot
from quip.jobs.report.report import Report
from quip.jobs.report.text import size_words
from quip.model.load import LoadedModel
from quip.model.records import MatrixRecord
from quip.model.walk import blocks_at_rest
from quip.packed.checkpoint import save_checkpoint
from quip.packed.checks import check_finite
from quip.packed.digests import check_digests
from quip.packed.files import weight_bytes, weight_files
from quip.packed.hub import check_files
from quip.packed.linear import quantized_layers

log = logging.getLogger(__name__)
ANEW = "quantize the model anew"


def save_with_notes(
    folder: Path,
    loaded: LoadedModel,
    records: Sequence[MatrixRecord],
    report: Report,
    *,
    parts: Sequence[Path] = (),
    overwrite: bool,
    resume: bool,
) -> None:
    """Save the checkpoint, unless the same run, now taken up again, has saved it already.

    Of a model that is streamed, `parts` are the files of its blocks, which become files of it.
    """
    if not (resume and _is_saved(folder, loaded, report)):
        if loaded.stream:
            for block in blocks_at_rest(loaded.model, device="cpu", stream=loaded.stream):
                check_finite(block.module, f"nothing is saved of {block.name}; {ANEW}")
        save_checkpoint(
            loaded.model,
            loaded.tokenizer,
            folder,
            parts=parts if loaded.stream else (),
            texts=_texts(folder, report),
            overwrite=overwrite or resume,
        )
    write_plot(records, folder)
    report.save("saved", checkpoint=_sizes(folder, loaded.model))
    write_notes(folder, report)
    log.info("%s: %s of weights", folder, size_words(report.entries["checkpoint"]["bytes"]))


def _is_saved(folder: Path, loaded: LoadedModel, report: Report) -> bool:
    """Whether the folder is the checkpoint of this very run, and whole."""
    saved = read_report(folder).get("fingerprint")
    if saved is None or saved != report.entries["fingerprint"]:
        return False
    try:
        files = weight_files(folder)
        check_files(loaded.model, [str(path) for path in files])
        check_digests(files)
    except QuipError:
        return False
    return True


def write_notes(folder: Path, report: Report) -> None:
    """The report and the card of a checkpoint, as of now."""
    for name, text in _texts(folder, report).items():
        with replacing(folder / name) as partial:
            partial.write_text(text)


def _texts(folder: Path, report: Report) -> dict[str, str]:
    has_plot = (folder / "layers.png").exists()
    card = model_card(report.entries, folder_name=folder.absolute().name, has_plot=has_plot)
    return {"run.json": as_json(report.entries), "README.md": card}


def _sizes(folder: Path, model: nn.Module) -> dict[str, int]:
    """Bytes of the files with weights, and of the same weights in 16 bits."""
    layers = quantized_layers(model).values()
    rest = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    weights = rest + sum(layer.in_features * layer.out_features for layer in layers)
    return {"bytes": weight_bytes(folder), "dense_bytes": 2 * weights}
