"""The proxy loss of every matrix by every method: what an ablation needs, and no perplexities.

QuIP's Table 14 for any model and store of Hessians. Each input of the store is read once, and what
several cases have in common is computed once (quip.matrix.quantize.quantize_by_many).
"""

import logging
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from quip.codebooks import CODEBOOKS, LATTICES, RmsGrid
from quip.codebooks.names import INTEGERS
from quip.data.hessians import HessianStore, StoredInput
from quip.errors import Unavailable, UsageError, finite, shown
from quip.jobs.calibration import store_for
from quip.jobs.requests import Machine, Place
from quip.matrix.build import build_recipe, flags_read
from quip.matrix.flags import FLAGS, Flags
from quip.matrix.flags_of_codes import TRELLIS
from quip.matrix.linalg import energy
from quip.matrix.methods import METHODS
from quip.matrix.quantize import quantize_by_many
from quip.matrix.recipe import Recipe
from quip.model.device import choose_device, device_name
from quip.model.load import load_model
from quip.model.matrices import Matrix
from quip.model.records import versions
from quip.packed.matrix import QuantizedMatrix
from quip.research.losses.folder import LossFolder
from quip.research.losses.rows import ANEW, Case, LossRow

log = logging.getLogger(__name__)

PROCESSING: dict[str, dict[str, Any]] = {"baseline": {}, "incoherence": {"incoh_processing": True}}


@dataclass(frozen=True, kw_only=True)
class ProxyBench(Machine, Place):
    """Everything that one bench depends on."""

    model: str
    store: Path
    quants: tuple[str, ...]
    wbits: tuple[int | float, ...] = (2, 3, 4)  # of grids; a lattice has its own
    processing: tuple[str, ...] = ("baseline",)
    codebooks: tuple[str, ...] = (INTEGERS,)
    flags: Mapping[str, Any] = field(default_factory=dict)  # of all recipes, as `Flags` names them
    layers: tuple[str, ...] = ()  # patterns; none: all matrices
    seed: int = 0
    resume: bool = False

    def recipes(self) -> dict[Case, Recipe]:
        """The recipe of each combination of what is compared.

        Ranges go to the cases that have one, and lattices do without ldlbal_admm where other
        methods are named. Raises UsageError for what means nothing.
        """
        self._check()
        found: dict[Case, Recipe] = {}
        unread = {name for name, value in self.flags.items() if value is not False}
        for processing, codebook, quant in product(self.processing, self.codebooks, self.quants):
            if codebook in LATTICES and quant == "ldlbal_admm" and len(self.quants) > 1:
                continue
            for bits in CODEBOOKS[codebook].widths(self.wbits):
                case = Case(quant=quant, codebook=codebook, wbits=bits, processing=processing)
                named = {"quant": quant, "codebook": codebook, "wbits": bits}
                named |= PROCESSING[processing]
                read = flags_read(**named)
                found[case] = build_recipe(
                    **named, **{k: v for k, v in self.flags.items() if k in read}
                )
                unread -= read
        for flag in unread:
            of = "the incoherent grid: add --incoh_processing, or --processing baseline,incoherence"
            if FLAGS[name := flag.rstrip("_")].metadata["said"].group == TRELLIS:
                of = "trellis codes: add --codebook trellis"
            raise UsageError(f"--{name} speaks of {of}")
        return found

    def _check(self) -> None:
        """Raise UsageError for names that are none."""
        for flag, names, known in (
            ("processing", self.processing, list(PROCESSING)),
            ("codebook", self.codebooks, list(CODEBOOKS)),
            ("quant", self.quants, list(METHODS)),
        ):
            for name in names:
                if name not in known:
                    raise UsageError(f"--{flag} {name}: not one of {', '.join(known)}")
        Flags(**self.flags).check()


def measure_losses(
    asked: ProxyBench, recipes: Mapping[Case, Recipe] | None = None
) -> list[LossRow]:
    """Quantize each matrix in each case, and write down what it loses, input by input.

    The cases are those of `recipes`, if given, which then is all that says how to quantize;
    otherwise all combinations that `asked` names.

    `out` receives run.json, proxy.csv and, in the end, summary.csv and plots; a kill costs the
    unfinished input. With `resume`, what proxy.csv holds already is not computed again; other
    methods, widths and layers may be added. What is asked for is checked first.
    """
    recipes = asked.recipes() if recipes is None else recipes
    device = choose_device(asked.device)
    HessianStore(asked.store)  # what is none is refused before the model is loaded
    folder = LossFolder(asked.out, resume=asked.resume, overwrite=asked.overwrite)
    loaded = load_model(asked.model, dtype=asked.dtype)
    model, store = loaded.model, store_for(asked.store, loaded)
    inputs = _chosen(store, asked)
    for name, recipe in product((n for _, names in inputs for n in names), recipes.values()):
        m, n = _weight(model, name).shape
        recipe.check(m, n, name)
    with folder.opened(_settings(asked, store, device)) as earlier:
        _check_earlier(earlier, store, asked.out)
        known = {(loss.name, loss.case): loss for loss in earlier}
        work = [(one, *_missing(names, recipes, known)) for one, names in inputs]
        total = sum(len(names) * len(cases) for _, names, cases in work)
        with tqdm(total=total, unit="matrix", dynamic_ncols=True, disable=None) as bar:
            for one, names, cases in work:
                if not names:
                    continue
                weights = {name: _weight(model, name).to(device) for name in names}
                H = store.read(one.name).H.to(device)
                for loss in _losses(one, weights, H, cases, asked.seed):
                    known[loss.name, loss.case] = loss
                    _show(loss, bar)
                log.info("%s: %d losses", one.name, len(names) * len(cases))
                folder.keep(list(known.values()))
        losses = _in_order(known.values(), store)
        folder.finish(losses)
    return losses


def _show(loss: LossRow, bar: tqdm) -> None:
    bar.set_description(loss.name)
    bar.set_postfix_str(f"{loss.case}: loss {loss.proxy_loss:.2e}")
    bar.update()


def _losses(
    one: StoredInput,
    weights: Mapping[str, Tensor],
    H: Tensor,
    recipes: Mapping[Case, Recipe],
    seed: int,
) -> Iterator[LossRow]:
    scales = {name: energy(W, H) for name, W in weights.items()}
    start = time.perf_counter()
    for name, case, found in quantize_by_many(weights, H, recipes, seed=seed):
        seconds = time.perf_counter() - start
        W, scale = weights[name], scales[name]
        error = energy(found.dequantize().double() - W.double(), H)
        yield LossRow(
            name=name,
            block=one.block,
            rows=W.shape[0],
            columns=W.shape[1],
            **vars(case),
            proxy_loss=finite(error / scale if scale else error, f"{name}: the proxy loss"),
            absolute_loss=error,
            bits_per_weight=found.bits_per_weight,
            damp=found.damp,
            rho=_rho(found),
            seconds=seconds,
        )
        start = time.perf_counter()


def _rho(found: QuantizedMatrix) -> float | None:
    book = found.book
    return book.rhos[0] if isinstance(book, RmsGrid) and len(book.rhos) == 1 else None


def _weight(model: nn.Module, name: str) -> Tensor:
    return Matrix(name, model.get_submodule(name)).weight.detach()


def _chosen(store: HessianStore, asked: ProxyBench) -> list[tuple[StoredInput, list[str]]]:
    """The inputs, and of their matrices those that a pattern names."""
    names = [name for one in store.inputs for name in one.matrices]
    wanted: set[str] = set() if asked.layers else set(names)
    for pattern in asked.layers:
        matching = [name for name in names if fnmatchcase(f".{name}.", f"*.{pattern}.*")]
        if not matching:
            raise UsageError(
                f"--layers {pattern}: it names no matrix; they are called like {names[0]}"
            )
        wanted.update(matching)
    found = [(one, [name for name in one.matrices if name in wanted]) for one in store.inputs]
    return [(one, names) for one, names in found if names]


def _missing(
    names: Sequence[str], recipes: Mapping[Case, Recipe], known: Container[tuple[str, Case]]
) -> tuple[list[str], dict[Case, Recipe]]:
    """The matrices that lack a case, and the cases that one of them lacks."""
    lacking = [pair for pair in product(names, recipes) if pair not in known]
    cases = {case: recipes[case] for _, case in lacking}
    return list(dict.fromkeys(name for name, _ in lacking)), cases


def _settings(asked: ProxyBench, store: HessianStore, device: str) -> dict[str, Any]:
    return {
        "model": asked.model,
        "store": str(asked.store),
        "digest": store.digest,
        "flags": dict(asked.flags),
        "seed": asked.seed,
        "dtype": asked.dtype,
        "device": device_name(device),
        "versions": versions(),
    }


def _check_earlier(losses: Sequence[LossRow], store: HessianStore, out: Path | None) -> None:
    """Raise Unavailable for a loss of no matrix of the store, or of no method."""
    names = {name for one in store.inputs for name in one.matrices}
    for loss in losses:
        words = {loss.name: names, loss.quant: METHODS, loss.codebook: CODEBOOKS}
        for word, known in {**words, loss.processing: PROCESSING}.items():
            if word not in known:
                raise Unavailable(f"{out}/proxy.csv is damaged (a row of {shown(word)}); {ANEW}")


def _in_order(losses: Iterable[LossRow], store: HessianStore) -> list[LossRow]:
    """By processing, codebook, method and bits; then along the model."""
    orders = [list(PROCESSING), list(CODEBOOKS), list(METHODS)]
    places = {name: i for i, name in enumerate(n for one in store.inputs for n in one.matrices)}

    def place(loss: LossRow) -> tuple[int | float, ...]:
        words = (loss.processing, loss.codebook, loss.quant)
        ranks = (order.index(word) for order, word in zip(orders, words, strict=True))
        return *ranks, loss.wbits, places[loss.name]

    return sorted(losses, key=place)
