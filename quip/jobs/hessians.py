"""The second moments of all inputs of a model, collected block by block into a store.

Of the unquantized model: each block is observed, and then passes on what it makes of its inputs. Or
of a model that is being quantized: each block sees what the quantized blocks before it pass on, and
the store gets the very Hessians that quantization used.

What is finished is on the disk: besides the store there is a ledger (quip.model.ledger), whose
hidden states, and quantized blocks, take up the walk after a kill.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from quip.data import TokenSet, check_dataset
from quip.data.hessian_files import file_of
from quip.data.hessians import StoreWriter
from quip.jobs.calibration import calibration_of
from quip.jobs.fingerprint import fingerprint_of
from quip.jobs.report.folder import RunFolder
from quip.jobs.requests import Calibration, Machine
from quip.matrix.hessian import Observed
from quip.matrix.recipe import Recipe
from quip.model.device import choose_device
from quip.model.experts import tell_of_few
from quip.model.ledger import Ledger
from quip.model.load import LoadedModel, load_model
from quip.model.matrices import check_quantizable, check_weights, find_blocks
from quip.model.quantize import Run, quantize_matrix_by_matrix
from quip.model.records import versions
from quip.model.states import batch_size_for
from quip.model.walk import walk

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Collection(Calibration, Machine):
    """Everything that a store depends on."""

    model: str
    dataset: str
    save: Path
    recipe: Recipe | None = None  # what blocks are quantized with; None: not at all
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection came to."""

    inputs: int
    matrices: int
    tokens: int
    nbytes: int
    seconds: float


def collect_hessians(asked: Collection) -> Collected:
    """Make the store in the folder `save`; with `resume`, complete the one that it holds.

    Tokens and batches are those of a run of the same data, seed and seqlen, and so are, bitwise,
    the Hessians where the recipe is the run's.
    """
    start = time.perf_counter()
    folder = RunFolder(asked.save, overwrite=asked.overwrite, resume=asked.resume, flag="--save")
    check_dataset(asked.dataset, "calibration")
    device = torch.device(choose_device(asked.device))
    loaded = load_model(asked.model, dtype=asked.dtype, seqlen=asked.seqlen)
    matrices = check_quantizable(loaded.model, loaded.name).quantized
    check_weights(loaded.model)
    for name in matrices:  # of which any may give a file its name
        file_of(asked.save, name)
    tokens = calibration_of(
        loaded, asked.dataset, nsamples=asked.nsamples, seqlen=asked.seqlen, seed=asked.seed
    )
    fingerprint = fingerprint_of(loaded, tokens, asked.recipe, asked=asked, device=device)
    ledger = Ledger(asked.save / RunFolder.BLOCKS, fingerprint)
    folder.open()
    try:
        ledger.open()
        writer = StoreWriter(asked.save, _facts(loaded, fingerprint), resume=asked.resume)
        if not writer.complete:
            _collect(asked, loaded, tokens, writer, ledger, device)
            writer.close()
        ledger.forget()
    finally:
        folder.release()
    return Collected(
        inputs=len(writer.files),
        matrices=len(matrices),
        tokens=tokens.ids.numel(),
        nbytes=sum(path.stat().st_size for path in writer.files),
        seconds=time.perf_counter() - start,
    )


def _facts(loaded: LoadedModel, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says beside the inputs."""
    return {
        "model": loaded.name,
        "digest": fingerprint["model"],
        "calibration": fingerprint["calibration"],
        "source": fingerprint["recipe"] or "original",
        "seed": fingerprint["seed"],
        **({"all_experts": True} if "all_experts" in fingerprint else {}),
        "dtype": fingerprint["dtype"],
        "device": fingerprint["device"],
        "versions": versions(),
    }


def _collect(
    asked: Collection,
    loaded: LoadedModel,
    tokens: TokenSet,
    writer: StoreWriter,
    ledger: Ledger,
    device: torch.device,
) -> None:
    _check_ledger(ledger, writer, len(find_blocks(loaded.model)[1]))
    if asked.recipe is None:
        _observe(asked, loaded, tokens, writer, ledger, device)
        return
    run = Run(
        recipe=asked.recipe,
        seed=asked.seed,
        device=device,
        batch_size=batch_size_for(tokens.seqlen, loaded.model, device),
        all_experts=asked.all_experts,
        ledger=ledger,
        observed=partial(_keep, writer),
    )
    for _ in quantize_matrix_by_matrix(loaded.model, tokens.ids, run):
        pass  # the matrix is in its place, for the blocks after it to feel


def _check_ledger(ledger: Ledger, writer: StoreWriter, count: int) -> None:
    """Start over where the ledger is past a block whose Hessians were damaged since."""
    entered = ledger.entered
    if any(not writer.has(i) for i in range(count) if i < entered or ledger.has(i)):
        log.warning("%s: files of the store are damaged; starting over for them", writer.folder)
        ledger.forget()


def _observe(
    asked: Collection,
    loaded: LoadedModel,
    tokens: TokenSet,
    writer: StoreWriter,
    ledger: Ledger,
    device: torch.device,
) -> None:
    """Walk over the blocks as they are."""
    start, hidden = ledger.hidden()
    count = len(find_blocks(loaded.model)[1])
    # disable=None: a bar on a terminal only.
    with tqdm(total=count, initial=start, unit="block", dynamic_ncols=True, disable=None) as bar:
        for block in walk(
            loaded.model,
            tokens.ids,
            device=device,
            batch_size=batch_size_for(tokens.seqlen, loaded.model, device),
            start=start,
            hidden=hidden,
        ):
            bar.set_description(block.name)
            if block.index > start:
                ledger.keep_hidden(block.index, block.hidden)
            if writer.has(block.index):
                log.info("block %d: taken from the store", block.index)
            else:
                hessians = block.observe(all_experts=asked.all_experts)
                tell_of_few(block.name, hessians)
                _keep(writer, block.index, hessians)
                del hessians  # what experts saw is not needed while the next block runs
            bar.update()


def _keep(writer: StoreWriter, block: int, hessians: Mapping[str, Observed]) -> None:
    if not writer.has(block):
        writer.keep(block, hessians)
        log.info("block %d: Hessians of %d matrices written", block, len(hessians))
