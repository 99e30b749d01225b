"""The pass that a job makes before it changes a model, or what an earlier one has found."""

import logging
from dataclasses import replace

import torch

from quip.data import TokenSet
from quip.data.hessian_files import FELT
from quip.jobs.experiment import Experiment
from quip.jobs.requests import NO_WEIGHTS, Calibration
from quip.matrix.recipe import Recipe
from quip.model.activations import Activations
from quip.model.ledger import Ledger
from quip.model.load import LoadedModel
from quip.model.matrices import find_blocks
from quip.model.plan import Plan
from quip.model.run import Run
from quip.model.sensitivity.files import kept_felt, write_felt
from quip.model.sensitivity.found import Sensitivity
from quip.model.sensitivity.gather import measure_sensitivity
from quip.model.sensitivity.measure import Passing
from quip.model.sides import Sides, check_two_sided
from quip.model.team import Team
from quip.transforms import rescales_outputs

log = logging.getLogger(__name__)


def felt_for(
    asked: Calibration,
    loaded: LoadedModel,
    tokens: TokenSet,
    *,
    device: torch.device,
    batch_size: int,
    team: Team,
    ledger: Ledger | None,
    activations: Activations,
) -> Sensitivity | None:
    """What the loss of a model feels on these tokens, at the first process of a team.

    It is taken from the folder of the ledger, or kept there. None where all blocks are finished,
    and at the other processes. Raises as `measure_sensitivity`.
    """
    if _is_finished(loaded, ledger, team):
        return None
    path = ledger.folder / FELT if ledger is not None and team.leads else None
    found = kept_felt(path) if path else None
    if team.tell(found is not None):
        return found
    passing = Passing(
        kind="fisher" if asked.token_weights == NO_WEIGHTS else asked.token_weights,
        seed=asked.seed,
        device=device,
        batch_size=batch_size,
        team=team,
        stream=loaded.stream,
        activations=activations,
    )
    found = measure_sensitivity(loaded.model, tokens.ids, passing)
    if found:
        _tell(found)
    if found and path:
        write_felt(path, found)
    return found


def with_felt(e: Experiment, loaded: LoadedModel, tokens: TokenSet, run: Run) -> Run:
    """The run, with what the loss feels of the model where that is asked for."""
    if e.recipe and is_asked_for(e.token_weights, e.recipe):
        with run.watch("sensitivity"):
            felt = felt_for(
                *(e, loaded, tokens),
                device=torch.device(run.device),
                batch_size=run.batch_size,
                team=run.team,
                ledger=run.ledger,
                activations=run.activations,
            )
        run = replace(run, felt=felt)
    if e.recipe and e.two_sided and not _is_finished(loaded, run.ledger, run.team):
        for recipe in Plan.of(e.recipe).each():
            check_two_sided(recipe)
        how = Passing(
            kind="fisher",
            seed=e.seed,
            device=torch.device(run.device),
            batch_size=run.batch_size,
            stream=loaded.stream,
            activations=run.activations,
        )
        with run.watch("sensitivity"):
            run = replace(run, sides=Sides.measured(loaded.model, tokens.ids, how))
    return run


def forget_felt(ledger: Ledger | None) -> None:
    """After the last block nobody needs what was felt."""
    if ledger is not None:
        (ledger.folder / FELT).unlink(missing_ok=True)


def is_asked_for(token_weights: str, how: Recipe | Plan | None) -> bool:
    """Whether tokens are to have weights, or outputs factors."""
    return token_weights != NO_WEIGHTS or rescales(how)


def rescales(how: Recipe | Plan | None) -> bool:
    """Whether some recipe rescales outputs, by what the loss feels of them."""
    recipes = Plan.of(how).each() if how else []
    return any(rescales_outputs(recipe.transforms) for recipe in recipes)


def _is_finished(loaded: LoadedModel, ledger: Ledger | None, team: Team) -> bool:
    """Whether an earlier run has done all blocks, as the first process knows."""
    blocks = range(len(find_blocks(loaded.model)[1]))
    return bool(team.tell(ledger is not None and all(map(ledger.has, blocks))))


def _tell(found: Sensitivity) -> None:
    """The heaviest token of all inputs, which may leave little to the others."""
    spread = {
        key.removeprefix("tokens "): s.max() / s.mean().clamp_min(torch.finfo(s.dtype).tiny)
        for key, s in found.windows.items()
        if key.startswith("tokens ")
    }
    if spread:
        name = max(spread, key=spread.__getitem__)
        told = len(spread), float(spread[name]), name
        log.info("tokens of %d inputs have weights of up to %.0f times the mean (%s)", *told)
