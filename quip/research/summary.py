"""What the Hessians of a store are like, as they are and as incoherence processing leaves them.

QuIP's Table 6 for any model, with what its script meant to measure: the true incoherence
max |Q_ij| sqrt(n), and H damped once.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from quip.device import choose_device, device_name
from quip.errors import UsageError
from quip.files import check_new, writing
from quip.hessian_store import HessianStore, Moments, StoredInput
from quip.models import load_model
from quip.quantize import rng_for
from quip.recipe import Recipe
from quip.recipes import build_recipe
from quip.records import versions
from quip.research.processing import Stage, processed
from quip.research.spectrum import weight_numbers
from quip.research.summary_rows import Row, Summary, histogram, write_rest, write_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Everything that one summary depends on."""

    store: Path
    model: str | None = None  # whose weights are processed with the Hessians
    rotation: str = "kronecker"
    rescale: bool = True  # where there is a model: rescaling balances H against weights
    percdamp: float = 0.01
    seed: int = 0  # of rotations
    layer: str | None = None  # the example, a matrix; None: the last input of the middle block
    device: str | None = None  # None: cuda if there is one
    out: Path | None = None
    overwrite: bool = False

    def recipe(self, *, rescale: bool) -> Recipe:
        """Of the flags that a run would have. Its transforms count, and its damping."""
        return build_recipe(
            wbits=4,
            pre_rescale=rescale,
            pre_proj=True,
            rotation=self.rotation,
            percdamp=self.percdamp,
        )


def summarize(asked: Asked) -> Summary:
    """Go through the store, input by input; what is known so far is in `out` after each.

    hessians.csv and matrices.csv, and in the end summary.json and spectra.safetensors. What is
    asked for is checked first.
    """
    if asked.out:
        check_new(asked.out, "--out", overwrite=asked.overwrite)
    recipe, device = asked.recipe(rescale=False), choose_device(asked.device)
    store = HessianStore(asked.store)
    example = _example(asked, store)
    model = load_model(asked.model).model if asked.model else None
    _check(store, model, recipe)
    summary = Summary(_settings(asked, store, device))
    if asked.out:
        with writing(asked.out):
            asked.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(store.inputs), unit="input", dynamic_ncols=True, disable=None) as bar:
        for one in store.inputs:
            bar.set_postfix_str(one.name)
            work = _Work(asked, one, store.read(one.name), device)
            for stage, row in (*work.of_input(), *work.of_matrices(model)):
                summary.add(row)
                if row.name == example and (row.weights is None) == (model is None):
                    summary.example.append(stage)
            if asked.out:
                write_rows(summary, asked.out)
            log.info("%s: mu %.1f", one.name, work.original.numbers.mu)
            bar.update()
    if asked.out:
        write_rest(summary, asked.out)
    return summary


def _example(asked: Asked, store: HessianStore) -> str:
    blocks = sorted({one.block for one in store.inputs})
    middle = blocks[len(blocks) // 2]
    *_, usual = (one.name for one in store.inputs if one.block == middle)
    names = [name for one in store.inputs for name in one.matrices]
    if asked.layer is not None and asked.layer not in names:
        raise UsageError(f"--layer {asked.layer}: the store holds no such matrix; say {usual}")
    if asked.layer is None or asked.model:
        return asked.layer or usual
    return next(one.name for one in store.inputs if asked.layer in one.matrices)


def _check(store: HessianStore, model: nn.Module | None, recipe: Recipe) -> None:
    if model is not None:
        store.check(model)
    for one in store.inputs:
        recipe.check(one.size, one.size, one.name)
        for name in one.matrices if model is not None else ():
            m, n = _weight(model, name).shape
            recipe.check(m, n, name)


def _weight(model: nn.Module | None, name: str) -> Tensor:
    assert model is not None
    return model.get_parameter(f"{name}.weight").detach()


def _settings(asked: Asked, store: HessianStore, device: str) -> dict[str, Any]:
    known = ("model", "calibration", "source")
    return {
        "store": {"folder": str(asked.store), **{key: store.manifest.get(key) for key in known}},
        "model": asked.model,
        "percdamp": asked.percdamp,
        "rotation": asked.rotation,
        "rescale": asked.rescale and asked.model is not None,
        "seed": asked.seed,
        "device": device_name(device),
        "versions": versions(),
    }


class _Work:
    """What there is to compute of one input; its decomposition is shared by all rows."""

    def __init__(self, asked: Asked, one: StoredInput, moments: Moments, device: str) -> None:
        self.asked, self.one, self.tokens, self.device = asked, one, moments.count, device
        H, mean = moments.H.to(device), moments.mean.to(device)
        self.original = Stage.original(one.name, H, mean, damp=asked.percdamp)
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
            for stage, W_t in self._stages(name, W, rescale=self.asked.rescale):
                yield stage, self._row(stage, name, role, W=W_t)

    def _stages(self, name: str, W: Tensor, *, rescale: bool) -> Iterator[tuple[Stage, Tensor]]:
        draws = self.asked.recipe(rescale=rescale).transforms
        return processed(self.original, W, draws, rng_for(self.asked.seed, name), name)

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
            incoherence=stage.spectrum.incoherence.cpu(),
            histogram=None if W is None else histogram(W),
        )
