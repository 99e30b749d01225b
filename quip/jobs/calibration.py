"""What tells of the inputs of a model's matrices: tokens to run through it, or a store."""

import logging
from pathlib import Path

from quip.data import TokenSet, calibration_tokens
from quip.data.hessians import HessianStore
from quip.errors import UsageError
from quip.jobs.evaluate import default_seqlen
from quip.jobs.fingerprint import identity_of
from quip.jobs.requests import NO_WEIGHTS, Calibration
from quip.jobs.sensitivity import rescales
from quip.matrix.recipe import Recipe
from quip.model.fingerprints import differences
from quip.model.load import LoadedModel
from quip.model.matrices import places
from quip.model.plan import Plan
from quip.packed.experts import Experts

log = logging.getLogger(__name__)


def calibration_of(
    loaded: LoadedModel, dataset: str, *, nsamples: int, seqlen: int | None, seed: int
) -> TokenSet:
    """The windows of a data set; without a `seqlen`, of what the model can take, at most 2048."""
    seqlen = seqlen or default_seqlen(loaded)
    return calibration_tokens(
        dataset, loaded.tokenizer, nsamples=nsamples, seqlen=seqlen, seed=seed
    )


def check_experts(loaded: LoadedModel, asked: Calibration) -> None:
    """Raise UsageError where all tokens are asked for, of each expert, and there are no experts."""
    if asked.all_experts and not any(isinstance(x, Experts) for x in loaded.model.modules()):
        raise UsageError(f"--all_experts: {loaded.name} has no experts; leave it out")


def store_for(folder: Path, loaded: LoadedModel) -> HessianStore:
    """The store in a folder, which must fit the model.

    That it was made of other weights (a fine-tuned model, another dtype) is only warned of.
    """
    store = HessianStore(folder)
    store.check(places(loaded.model))
    changes = differences(store.manifest["digest"], identity_of(loaded))
    if changes:
        log.warning("the store %s is not quite of this model (%s)", folder, changes)
    return store


def check_weights_of(store: HessianStore, asked: Calibration, how: Recipe | Plan | None) -> None:
    """Raise UsageError, with the remedy, where a store is of other weights than are asked for."""
    wanted, known = asked.token_weights, store.token_weights or NO_WEIGHTS
    if wanted != known:
        raise UsageError(
            f"--token_weights {wanted}: the Hessians in {store.folder} are of --token_weights "
            f"{known}; say that, or collect others: quip hessians MODEL DATASET --token_weights "
            + wanted
        )
    if rescales(how) and not store.felt:
        raise UsageError(
            f"--pre_rescale_out: the store {store.folder} does not know what the loss feels of "
            "outputs; collect one that does: quip hessians MODEL DATASET --token_weights fisher"
        )
