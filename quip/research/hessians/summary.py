"""What the Hessians of a store are like, as they are and as incoherence processing leaves them.

QuIP's Table 6 for any model, with what its script meant to measure: the true incoherence
max |Q_ij| sqrt(n), and H damped once.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from quip.data.hessians import HessianStore, Moments, StoredInput
from quip.errors import UsageError
from quip.jobs.calibration import store_for
from quip.jobs.report.folder import RunFolder
from quip.jobs.requests import Machine, Place
from quip.matrix.build import build_recipe
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.model.device import choose_device, device_name
from quip.model.load import load_model
from quip.model.matrices import Matrix
from quip.model.records import versions
from quip.research.hessians.plots import PICTURES, write_plots
from quip.research.hessians.rows import (
    TABLES,
    Example,
    Row,
    Summary,
    histogram,
    write_rest,
    write_rows,
)
from quip.research.hessians.spectrum import weight_numbers
from quip.research.hessians.stages import Stage, processed

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SummaryRequest(Machine, Place):
    """Everything that one summary depends on."""

    store: Path
    model: str | None = None  # whose weights are processed with the Hessians
    rotation: str = "kronecker"
    rescale: bool = True  # where there is a model: rescaling balances H against weights
    percdamp: float = 0.01
    seed: int = 0  # of rotations
    layer: str | None = None  # the example, a matrix; None: the last input of the middle block
    pictures: bool = False  # in `out`, too; needs matplotlib

    def recipe(self, *, rescale: bool) -> Recipe:
        """The recipe of a run with these flags, of which only transforms and damping matter."""
        return build_recipe(
            wbits=4,
            pre_rescale=rescale,
            pre_proj=True,
            rotation=self.rotation,
            percdamp=self.percdamp,
        )


def summarize(request: SummaryRequest) -> Summary:
    """Go through the store, input by input; what is known so far is in `out` after each.

    hessians.csv and matrices.csv, and in the end summary.json, spectra.safetensors and pictures.
    What is asked for is checked first. The model is loaded in the store's dtype.
    """
    folder = _folder(request)
    recipe, device = request.recipe(rescale=False), choose_device(request.device)
    store = HessianStore(request.store)
    example, model = _example(request, store), None
    if request.model:
        loaded = load_model(request.model, dtype=store.manifest["dtype"])
        store, model = store_for(request.store, loaded), loaded.model
    _check(store, model, recipe)
    summary = Summary(_settings(request, store, device))
    with (
        _opened(folder),
        tqdm(total=len(store.inputs), unit="input", dynamic_ncols=True, disable=None) as bar,
    ):
        for one in store.inputs:
            bar.set_postfix_str(one.name)
            _add(summary, _Work(request, one, store.read(one.name), device), model, example)
            if folder:
                write_rows(summary, folder.path)
            bar.update()
        if folder:
            write_rest(summary, folder.path)
            if request.pictures:
                write_plots(summary, folder.path)
    return summary


def _folder(request: SummaryRequest) -> RunFolder | None:
    if request.out is None:
        return None
    if request.out.resolve() == request.store.resolve():
        raise UsageError(f"--out {request.out}: it is the store; name another folder")
    return RunFolder(request.out, overwrite=request.overwrite)


@contextmanager
def _opened(folder: RunFolder | None) -> Iterator[None]:
    """Others are kept out meanwhile, and an earlier summary is gone: two never mix."""
    if folder is None:
        yield
        return
    folder.open()
    try:
        for name in (*TABLES, *PICTURES):
            (folder.path / name).unlink(missing_ok=True)
        yield
    finally:
        folder.release()


def _add(summary: Summary, work: "_Work", model: nn.Module | None, example: str) -> None:
    """All rows of one input. Of its stages no more are held than the next is made of."""
    for stage, row in chain(work.of_input(), work.of_matrices(model)):
        summary.add(row)
        shown = row.name == example and (row.weights is None) == (model is None)
        if shown and work.request.pictures:
            summary.example.append(Example.of(stage))
    log.info("%s: mu %.1f", work.one.name, work.original.numbers.mu)


def _example(request: SummaryRequest, store: HessianStore) -> str:
    blocks = sorted({one.block for one in store.inputs})
    middle = blocks[len(blocks) // 2]
    *_, usual = (one.name for one in store.inputs if one.block == middle)
    names = [name for one in store.inputs for name in one.matrices]
    if request.layer is not None and request.layer not in names:
        raise UsageError(f"--layer {request.layer}: the store holds no such matrix; say {usual}")
    if request.layer is None or request.model:
        return request.layer or usual
    return next(one.name for one in store.inputs if request.layer in one.matrices)


def _check(store: HessianStore, model: nn.Module | None, recipe: Recipe) -> None:
    for one in store.inputs:
        recipe.check(one.size, one.size, one.name)
        for name in one.matrices if model is not None else ():
            m, n = _weight(model, name).shape
            recipe.check(m, n, name)


def _weight(model: nn.Module | None, name: str) -> Tensor:
    assert model is not None
    return Matrix(name, model.get_submodule(name)).weight.detach()


def _settings(request: SummaryRequest, store: HessianStore, device: str) -> dict[str, Any]:
    known = ("model", "calibration", "source")
    return {
        "store": {"folder": str(request.store), **{key: store.manifest.get(key) for key in known}},
        "model": request.model,
        "percdamp": request.percdamp,
        "rotation": request.rotation,
        "rescale": request.rescale and request.model is not None,
        "seed": request.seed,
        "device": device_name(device),
        "versions": versions(),
    }


class _Work:
    """What there is to compute of one input; its decomposition is shared by all rows."""

    def __init__(
        self, request: SummaryRequest, one: StoredInput, moments: Moments, device: str
    ) -> None:
        self.request, self.one, self.tokens, self.device = request, one, moments.count, device
        H, mean = moments.H.to(device), moments.mean.to(device)
        self.original = Stage.original(one.name, H, mean, damp=request.percdamp)
        self.roles = [name.rpartition(".")[2].removesuffix("_proj") for name in one.matrices]

    def of_input(self) -> Iterator[tuple[Stage, Row]]:
        """The input as it is and rotated, as the first matrix that it feeds would rotate it."""
        W = self.original.H.new_zeros(1, self.one.size)  # no more than a width
        count = len(self.one.matrices)
        for stage, _ in self._stages(self.one.name, W, rescale=False):
            yield stage, self._row(stage, self.one.name, "/".join(self.roles), count=count)

    def of_matrices(self, model: nn.Module | None) -> Iterator[tuple[Stage, Row]]:
        """Each matrix that it feeds, where there is a model, at each stage."""
        for name, role in zip(self.one.matrices if model else (), self.roles, strict=False):
            W = _weight(model, name).to(self.device)
            for stage, W_t in self._stages(name, W, rescale=self.request.rescale):
                yield stage, self._row(stage, name, role, W=W_t)

    def _stages(self, name: str, W: Tensor, *, rescale: bool) -> Iterator[tuple[Stage, Tensor]]:
        draws = self.request.recipe(rescale=rescale).transforms
        return processed(self.original, W, draws, rng_for(self.request.seed, name), name)

    def _row(
        self, stage: Stage, name: str, role: str, *, W: Tensor | None = None, count: int = 1
    ) -> Row:
        return Row(
            name=name,
            role=role,
            input="/".join(self.roles),
            block=self.one.block,
            rows=None if W is None else len(W),
            columns=self.one.size,
            tokens=self.tokens,
            processing=stage.processing,
            matrices=count,
            hessian=stage.numbers,
            weights=None if W is None else weight_numbers(W),
            spectrum=stage.spectrum.values.cpu(),
            histogram=None if W is None else histogram(W),
        )
