"""The second moments of all inputs of a model, collected block by block into a store.

Of the unquantized model: each block is observed, and then passes on what it makes of its inputs. Or
of a model that is being quantized: each block sees what the quantized blocks before it pass on, and
the store gets the very Hessians that quantization used.

What is finished is on the disk: besides the store there is a ledger (quip.model.ledger), whose
hidden states, and quantized blocks, take up the walk after a kill.
"""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from quip.data import TokenSet, check_dataset
from quip.data.hessian_files import FELT, file_of
from quip.data.hessians import StoreWriter
from quip.jobs.alike import check_inputs, check_request
from quip.jobs.calibration import calibration_of, check_experts
from quip.jobs.fingerprint import fingerprint_of
from quip.jobs.kept import Kept
from quip.jobs.report.folder import RunFolder
from quip.jobs.requests import NO_WEIGHTS, Calibration, Machine
from quip.jobs.sensitivity import felt_for, forget_felt, is_asked_for
from quip.jobs.streaming import check_all_weights
from quip.matrix.recipe import Recipe
from quip.model.activations import Activations
from quip.model.device import choose_device
from quip.model.experts import tell_of_few
from quip.model.ledger import Ledger
from quip.model.load import LoadedModel, load_model
from quip.model.matrices import check_quantizable, find_blocks
from quip.model.progress import Progress
from quip.model.quantize import quantize_matrix_by_matrix
from quip.model.records import versions
from quip.model.run import Run
from quip.model.sensitivity.files import write_felt
from quip.model.sensitivity.found import Sensitivity
from quip.model.sensitivity.gather import share
from quip.model.states import batch_size_for
from quip.model.team import Team, joined
from quip.model.walk import walk

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Collection(Calibration, Machine):
    """Everything that a store depends on."""

    model: str
    dataset: str
    save: Path
    recipe: Recipe | None = None  # what blocks are quantized with; None: not at all
    activation_memory: float | None = None  # GB of hidden states; None: a quarter of what is free
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
    with joined(asked.device, exact=not asked.fast_reduce) as team:
        return _collect(asked, team)


def _collect(asked: Collection, team: Team) -> Collected:
    start = time.perf_counter()
    folder = _folder(asked) if team.leads else None
    check_dataset(asked.dataset, "calibration")
    device = torch.device(choose_device(asked.device))
    check_request(team, asked, str(device))
    loaded = load_model(asked.model, dtype=asked.dtype, seqlen=asked.seqlen, stream=asked.stream)
    matrices = check_quantizable(loaded.model, loaded.name).quantized
    check_experts(loaded, asked)
    check_all_weights(loaded)
    for name in matrices:  # of which any may give a file its name
        file_of(asked.save, name)
    tokens = calibration_of(
        loaded, asked.dataset, nsamples=asked.nsamples, seqlen=asked.seqlen, seed=asked.seed
    )
    check_inputs(team, {"model": loaded}, calibration=tokens.stamp)
    files: list[Path] = []
    if folder is None:
        _walk(asked, loaded, tokens, Kept(None, None, team), device)
    else:
        fingerprint = fingerprint_of(
            loaded, tokens, asked.recipe, asked=asked, device=device, exact=team.exact
        )
        ledger = Ledger(asked.save / RunFolder.BLOCKS, fingerprint, loaded.stream)
        folder.open()
        try:
            ledger.open()
            writer = StoreWriter(asked.save, _facts(loaded, fingerprint), resume=asked.resume)
            _walk(asked, loaded, tokens, Kept(writer, ledger, team), device)
            if not writer.complete:
                writer.close()
            ledger.forget()
            forget_felt(ledger)
        finally:
            folder.release()
        files = writer.files
    return Collected(
        inputs=len(files),
        matrices=len(matrices),
        tokens=tokens.ids.numel(),
        nbytes=sum(path.stat().st_size for path in files),
        seconds=time.perf_counter() - start,
    )


def _folder(asked: Collection) -> RunFolder:
    return RunFolder(asked.save, overwrite=asked.overwrite, resume=asked.resume, flag="--save")


def _facts(loaded: LoadedModel, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says beside the inputs."""
    return {
        "model": loaded.name,
        "digest": fingerprint["model"],
        "calibration": fingerprint["calibration"],
        "source": fingerprint["recipe"] or "original",
        "seed": fingerprint["seed"],
        **{key: fingerprint[key] for key in ("all_experts", "token_weights") if key in fingerprint},
        "dtype": fingerprint["dtype"],
        "device": fingerprint["device"],
        "versions": versions(),
    }


def _walk(
    asked: Collection, loaded: LoadedModel, tokens: TokenSet, kept: Kept, device: torch.device
) -> None:
    if kept.complete:
        return
    kept.check(len(find_blocks(loaded.model)[1]))
    batch_size = batch_size_for(tokens.seqlen, loaded.model, device)
    place = kept.ledger.folder if kept.ledger else None
    activations = Activations.within(asked.activation_memory, place)
    felt = None
    if is_asked_for(asked.token_weights, asked.recipe):
        felt = felt_for(
            *(asked, loaded, tokens),
            device=device,
            batch_size=batch_size,
            team=kept.team,
            ledger=kept.ledger,
            activations=activations,
        )
    if felt:
        write_felt(asked.save / FELT, replace(felt, windows={}))
    if asked.recipe is None:
        _observe(asked, loaded, tokens, kept, felt, device, batch_size, activations)
        return
    run = Run(
        recipe=asked.recipe,
        seed=asked.seed,
        device=device,
        batch_size=batch_size,
        all_experts=asked.all_experts,
        felt=felt,
        weighs=asked.token_weights != NO_WEIGHTS,
        ledger=kept.ledger,
        team=kept.team,
        stream=loaded.stream,
        activations=activations,
        observed=kept.keep,
    )
    for _ in quantize_matrix_by_matrix(loaded.model, tokens.ids, run):
        pass  # the matrix is in its place, for the blocks after it to feel


def _observe(
    asked: Collection,
    loaded: LoadedModel,
    tokens: TokenSet,
    kept: Kept,
    felt: Sensitivity | None,
    device: torch.device,
    batch_size: int,
    activations: Activations,
) -> None:
    """Walk over the blocks as they are."""
    kept.team.check(len(tokens.ids), batch_size)
    progress = Progress.of(kept.ledger, kept.team, batch_size)
    start, hidden = progress.enter()
    count, weights = len(find_blocks(loaded.model)[1]), share(felt, kept.team, batch_size)
    # disable=None: a bar on a terminal only.
    with tqdm(total=count, initial=start, unit="block", dynamic_ncols=True, disable=None) as bar:
        for block in walk(
            loaded.model,
            kept.team.share(tokens.ids, batch_size),
            device=device,
            batch_size=batch_size,
            start=start,
            hidden=hidden,
            team=kept.team,
            stream=loaded.stream,
            activations=activations,
        ):
            bar.set_description(block.name)
            if block.index > start:
                progress.keep_hidden(block.index, block.hidden)
            if kept.has(block.index):
                log.info("block %d: taken from the store", block.index)
            else:
                (hessians,) = block.observe_each([weights], all_experts=asked.all_experts)
                tell_of_few(block.name, hessians)
                kept.keep(block.index, hessians)
                del hessians  # what experts saw is not needed while the next block runs
            bar.update()
