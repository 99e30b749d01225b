"""The bench of proxy losses: every loss is that of one matrix quantized alone."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor

from quip.data import hessians
from quip.data.hessians import HessianStore
from quip.errors import Unavailable, UsageError
from quip.jobs.fingerprint import identity_of
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for
from quip.model.load import load_model
from quip.research.losses import bench
from quip.research.losses.bench import ProxyBench, measure_losses
from quip.research.losses.rows import Case, LossRow, method_tables, read_losses, summarised
from tests.support.hessians import observed, written
from tests.support.runs import save_model

BOTH = ("baseline", "incoherence")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "opt")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "opt"
    written(folder, observed("opt"))
    return folder


@pytest.fixture
def ask(model, store) -> Callable[..., ProxyBench]:
    def make(**given) -> ProxyBench:
        known = {"quants": ("ldlq",), "wbits": (2,), "layers": ("layers.0",), "device": "cpu"}
        return ProxyBench(model=model, store=store, **{**known, **given})

    return make


def trace(E: Tensor, H: Tensor) -> float:
    return float(torch.einsum("ij,jk,ik->", E.double(), H, E.double()))


def without_time(losses: list[LossRow]) -> list[dict[str, object]]:
    return [{k: v for k, v in vars(loss).items() if k != "seconds"} for loss in losses]


# What is measured


def test_every_loss_is_that_of_the_matrix_quantized_alone(ask, model, store):
    asked = ask(quants=("nearest", "ldlq", "ldlqRG"), wbits=(2, 3), processing=BOTH, seed=4)
    losses, loaded = measure_losses(asked), load_model(model).model
    assert len(losses) == 6 * 3 * 2 * 2
    for loss in losses:
        W = loaded.get_parameter(f"{loss.name}.weight").detach()
        H = HessianStore(store).read(loss.name).H
        incoherent = loss.processing == "incoherence"
        recipe = build_recipe(quant=loss.quant, wbits=loss.wbits, incoh_processing=incoherent)
        alone = quantize_matrix(W, H, recipe, rng=rng_for(4, loss.name))
        error = trace(alone.dequantize().double() - W.double(), H)
        assert loss.absolute_loss == pytest.approx(error, rel=1e-9)  # sums in another order
        assert loss.proxy_loss == pytest.approx(error / trace(W, H), rel=1e-9)
        assert (loss.rows, loss.columns, loss.block) == (*W.shape, 0)
        assert (loss.bits_per_weight, loss.damp) == (alone.bits_per_weight, alone.damp)


def test_losses_come_by_processing_method_and_bits_and_then_along_the_model(ask, store):
    asked = ask(quants=("ldlq", "nearest"), wbits=(3, 2), processing=BOTH[::-1], layers=())
    losses = measure_losses(asked)
    names = [name for one in HessianStore(store).inputs for name in one.matrices]
    assert [loss.name for loss in losses] == 8 * names
    cases = list(dict.fromkeys(loss.case for loss in losses))
    assert [(c.processing, c.quant, c.wbits) for c in cases] == [
        (p, q, b) for p in BOTH for q in ("nearest", "ldlq") for b in (2, 3)
    ]


def test_the_range_that_rho_auto_kept_is_written_down(ask):
    losses = measure_losses(ask(processing=BOTH, flags={"rho": "auto", "range_": "tensor"}))
    assert {loss.rho for loss in losses if loss.processing == "baseline"} == {None}
    kept = {loss.rho for loss in losses if loss.processing == "incoherence"}
    trials = build_recipe(wbits=2, incoh_processing=True, rho="auto").trials
    assert kept <= {None, *(book.rhos[0] for book in trials[1:])}
    assert kept != {None}


def test_lattices_have_their_own_bits_and_do_without_bounded_feedback(ask):
    asked = ask(
        quants=("ldlq", "ldlbal_admm"), wbits=(3,), codebooks=("int", "E8P12"), processing=BOTH
    )
    found = [(c.quant, c.codebook, c.wbits, c.processing) for c in asked.recipes()]
    assert set(found) == {
        *(("ldlq", book, bits, p) for book, bits in (("int", 3), ("E8P12", 2)) for p in BOTH),
        *(("ldlbal_admm", "int", 3, p) for p in BOTH),
    }
    losses = measure_losses(ask(codebooks=("E8P12",), layers=("layers.0.fc1",)))
    assert [loss.wbits for loss in losses] == [2]


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ((), 24),
        (("fc1",), 4),
        (("layers.1",), 6),
        (("layers.*.fc1", "q_proj"), 8),
        (("layers.1", "fc1"), 9),
        (("model.decoder.layers.2.self_attn.*_proj",), 4),
    ],
)
def test_layers_are_any_run_of_the_parts_of_a_name(ask, patterns, count):
    losses = measure_losses(ask(quants=("nearest",), layers=patterns))
    assert len({loss.name for loss in losses}) == len(losses) == count


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": ("fc3",)}, r"--layers fc3: it names no matrix; .* like model\.decoder"),
        ({"layers": ("fc",)}, r"--layers fc: it names no matrix"),
        ({"processing": ("both",)}, r"--processing both: not one of baseline, incoherence"),
        ({"codebooks": ("E8",)}, r"--codebook E8: not one of int, E8P12"),
        ({"quants": ("rtn",)}, r"--quant rtn: not one of"),
        ({"wbits": (9,)}, r"--wbits 9"),
        ({"flags": {"rho": "auto"}}, r"--rho speaks of the incoherent grid: add --incoh"),
        ({"flags": {"range_": "tensor"}}, r"--range speaks of the incoherent grid"),
        ({"quants": ("ldlbal_admm",), "codebooks": ("E8P12",)}, r"--quant ldlbal_admm bounds"),
        ({"device": "abacus"}, r"--device abacus"),
    ],
    ids=str,
)
def test_what_means_nothing_is_refused_before_anything_is_written(ask, tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        measure_losses(ask(out=tmp_path / "bench", **given))
    assert not list(tmp_path.iterdir())


def test_cases_may_be_handed_over_that_are_no_product(ask, tmp_path):
    all_of_them = ask(wbits=(2, 3), quants=("nearest", "ldlq"))
    recipes = all_of_them.recipes()
    some = {
        case: recipe
        for case, recipe in recipes.items()
        if (case.quant, case.wbits) in (("nearest", 2), ("ldlq", 3))
    }
    losses = measure_losses(ask(out=tmp_path, wbits=(8,)), some)
    assert {(loss.quant, loss.wbits) for loss in losses} == {("nearest", 2), ("ldlq", 3)}
    expected = [loss for loss in measure_losses(all_of_them) if loss.case in some]
    assert without_time(losses) == without_time(expected)


def test_a_store_of_other_weights_is_warned_of(ask, model, tmp_path, caplog):
    words = {"model": "tiny", "dtype": "float32", "calibration": {"dataset": "random"}}
    for name, digest in (("its own", identity_of(load_model(model))), ("another", {})):
        caplog.clear()
        written(tmp_path / name, observed("opt"), facts={**words, "digest": digest})
        measure_losses(replace(ask(layers=("layers.0.fc1",)), store=tmp_path / name))
        warned = f"the store {tmp_path / name} is not quite of this model" in caplog.text
        assert warned == (name == "another")


# What is kept


def test_the_folder_holds_every_loss_and_the_means(ask, tmp_path):
    losses = measure_losses(ask(quants=("nearest", "ldlq"), processing=BOTH, out=tmp_path))
    assert read_losses(tmp_path / "proxy.csv") == losses
    with (tmp_path / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4
    for line in lines:
        known = {k: v for k, v in line.items() if k in ("quant", "processing")}
        rows = [loss for loss in losses if known.items() <= vars(loss).items()]
        values = [loss.proxy_loss for loss in rows]
        assert int(line["matrices"]) == len(rows) == 6
        assert float(line["mean_proxy_loss"]) == pytest.approx(fmean(values))
        assert float(line["total_proxy_loss"]) == pytest.approx(sum(values))
        geometric = math.prod(values) ** (1 / 6)
        assert float(line["geometric_mean_proxy_loss"]) == pytest.approx(geometric)
        assert float(line["total_absolute_loss"]) == pytest.approx(
            sum(loss.absolute_loss for loss in rows)
        )


def test_plots_are_drawn_where_matplotlib_is(ask, tmp_path):
    pytest.importorskip("matplotlib")
    measure_losses(ask(processing=BOTH, layers=("fc1",), out=tmp_path))
    for name in ("depth.png", "methods.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_bench_that_was_killed_goes_on_after_its_last_whole_input(ask, tmp_path, monkeypatch):
    whole = measure_losses(ask(wbits=(2, 3), out=tmp_path / "whole"))
    read, reads = HessianStore.read, []

    def failing(self, name):
        reads.append(name)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(hessians.HessianStore, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        measure_losses(ask(wbits=(2, 3), out=tmp_path / "killed"))
    kept = read_losses(tmp_path / "killed" / "proxy.csv")
    assert {loss.name.rpartition(".")[2] for loss in kept} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }
    resumed = measure_losses(ask(wbits=(2, 3), out=tmp_path / "killed", resume=True))
    assert len(reads) == 3 + 2
    assert without_time(resumed) == without_time(whole)
    assert read_losses(tmp_path / "killed" / "proxy.csv") == resumed
    assert [loss for loss in resumed if loss in kept] == sorted(kept, key=resumed.index)


def test_methods_bits_and_layers_may_be_added_to_a_folder(ask, tmp_path, monkeypatch):
    measure_losses(ask(out=tmp_path, layers=("fc1",)))
    quantized: list[tuple[str, Case]] = []
    by_many = bench.quantize_by_many

    def counted(weights, H, recipes, *, seed):
        for found in by_many(weights, H, recipes, seed=seed):
            quantized.append(found[:2])
            yield found

    monkeypatch.setattr(bench, "quantize_by_many", counted)
    more = {"wbits": (2, 3), "layers": ("fc1", "fc2"), "resume": True}
    losses = measure_losses(ask(out=tmp_path, **more))
    assert len(losses) == 16
    assert len(quantized) == 16 - 4
    quantized.clear()
    assert measure_losses(ask(out=tmp_path, layers=("fc1",), resume=True)) == losses
    assert quantized == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"dtype": "bfloat16"}, "dtype auto, not bfloat16"),
        ({"flags": {"npasses": 1}}, r"flags {}, not {'npasses': 1}"),
    ],
    ids=str,
)
def test_losses_of_other_settings_are_never_mixed(ask, tmp_path, change, message):
    measure_losses(ask(out=tmp_path, layers=("layers.0.fc1",)))
    before = (tmp_path / "proxy.csv").read_bytes()
    with pytest.raises(UsageError, match=f"holds losses with {message}; name another folder"):
        measure_losses(ask(out=tmp_path, resume=True, **change))
    with pytest.raises(UsageError, match="is not empty; name another folder or add --overwrite"):
        measure_losses(ask(out=tmp_path, **change))
    assert (tmp_path / "proxy.csv").read_bytes() == before
    losses = measure_losses(ask(out=tmp_path, overwrite=True, layers=("layers.1.fc1",), **change))
    assert read_losses(tmp_path / "proxy.csv") == losses
    assert {loss.block for loss in losses} == {1}


def test_a_damaged_file_of_losses_is_named(ask, tmp_path):
    measure_losses(ask(out=tmp_path, layers=("layers.0.fc1",)))
    path = tmp_path / "proxy.csv"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(Unavailable, match=r"proxy\.csv is damaged .* --overwrite"):
        measure_losses(ask(out=tmp_path, resume=True))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("fc1,", "fc9,", r"a row of '\S*fc9'"),
        ("nearest", "furthest", "a row of 'furthest'"),
        ("baseline", "x" * 1000, r"a row of 'x+\.\.\.x+'"),
        ("name,", "names,", "no 'name'"),
        ("baseline", "x" * 200_000, r"field larger than field limit"),
        (",0,", ",zero,", "invalid literal for int"),
    ],
)
def test_rows_that_no_bench_wrote_are_damage(ask, tmp_path, old, new, says):
    measure_losses(ask(out=tmp_path, layers=("layers.0.fc1",), quants=("nearest",)))
    path = tmp_path / "proxy.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Unavailable, match=rf"proxy\.csv is damaged \(.*{says}.* --overwrite"):
        measure_losses(ask(out=tmp_path, resume=True, quants=("nearest",)))


@pytest.mark.parametrize("text", ["5", "[]", "{", '{"seed": 1, "seed": 1}', '{"model": 5}'])
def test_a_damaged_report_of_a_bench_is_named(ask, tmp_path, text):
    measure_losses(ask(out=tmp_path, layers=("layers.0.fc1",), quants=("nearest",)))
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(Unavailable, match=r"run\.json is damaged \(.*\); remove it if what it"):
        measure_losses(ask(out=tmp_path, resume=True, quants=("nearest",)))


# What is shown


def loss(**given) -> LossRow:
    known = {"name": "fc1", "block": 0, "rows": 2, "columns": 3, "damp": 0.01, "seconds": 1.0}
    case = {"quant": "ldlq", "codebook": "int", "wbits": 2, "processing": "baseline"}
    numbers = {"proxy_loss": 0.5, "absolute_loss": 4.0, "bits_per_weight": 2.5, "rho": None}
    return LossRow(**{**known, **case, **numbers, **given})


def test_tables_have_methods_down_and_bits_across():
    losses = [
        loss(proxy_loss=0.25),
        loss(proxy_loss=0.75),
        loss(wbits=3, proxy_loss=0.125),
        loss(quant="nearest"),
        loss(codebook="E8P12", processing="incoherence"),
    ]
    assert method_tables(losses, "mean_proxy_loss", "mean") == [
        [
            ("mean, baseline", "3 bits", "2 bits"),
            ("ldlq", "0.125", "0.5"),
            ("nearest", "-", "0.5"),
        ],
        [("mean, incoherence", "2 bits"), ("ldlq, E8P12", "0.5")],
    ]


def test_a_loss_of_nothing_has_a_geometric_mean_and_bits_are_those_of_all_weights():
    (line,) = summarised([loss(proxy_loss=0.0), loss(rows=4, bits_per_weight=4.0)])
    assert line["geometric_mean_proxy_loss"] == 0
    assert line["bits_per_weight"] == pytest.approx((2.5 * 6 + 4.0 * 12) / 18)
    assert line["seconds"] == 2.0
