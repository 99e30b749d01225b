"""--dry_run: what a run will need, from headers alone, beside what it then takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quip.errors import UnsupportedModel, UsageError
from quip.jobs import dry_run
from quip.jobs.dry_run import Question, foretell
from quip.jobs.forecast import rates
from quip.jobs.forecast.rates import Left, Rates
from quip.jobs.hessians import Collection, collect_hessians
from quip.jobs.report.forecast import forecast_words
from quip.jobs.requests import request
from quip.jobs.run import Experiment, run_experiment
from quip.matrix.build import build_recipe
from quip.model import activations
from quip.model.load import load_model
from quip.model.tables import pack_tables
from quip.packed.files import header
from tests.support.runs import save_model, write_text

RECIPE = build_recipe(quant="ldlq", wbits=3, incoh_processing=True)
STACKED = build_recipe(codebook="E8P12")
ROUND = Rates(
    **dict.fromkeys(("product", "single", "double", "factor", "observe"), 1e9),
    **dict.fromkeys(("copy", "read", "write"), 1e8),
)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("here")
    save_model(folder / "llama", "llama")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture
def asked(here, monkeypatch) -> Question:
    """A question about a run, on a machine of round numbers."""
    monkeypatch.setattr(dry_run, "measured_rates", lambda *_: ROUND)
    monkeypatch.setattr(rates, "ROWS", (32,))
    monkeypatch.setattr(rates, "COLUMNS", 64)
    monkeypatch.setattr(Left, "of", lambda self, m, n: m * n * 1e-9)
    return Question(
        model=str(here / "llama"),
        recipe=RECIPE,
        nsamples=1024,
        seqlen=16,
        device="cpu",
        eval_datasets=(str(here / "text.txt"),),
        eval_nsamples=2,
    )


@pytest.mark.parametrize("recipe", [RECIPE, STACKED], ids=["alone", "stacked"])
def test_bits_and_files_are_those_of_the_run(asked, recipe, tmp_path):
    asked = replace(asked, recipe=recipe, nsamples=8, save=tmp_path / "saved", out=tmp_path / "out")
    found = foretell(asked)
    assert not any(tmp_path.iterdir())
    dataset, *_ = asked.eval_datasets
    report = run_experiment(request(Experiment, asked, dataset=dataset, eval_datasets=()))
    assert found["bits_per_weight"] == pytest.approx(report["totals"]["bits_per_weight"], abs=1e-9)
    assert found["matrices"] == report["totals"]["matrices"]
    # Of matrices so small headers are the larger part, and foretold by the number of tensors.
    disk, checkpoint = found["disk_bytes"], report["checkpoint"]["bytes"]
    assert disk["checkpoint"] == pytest.approx(checkpoint, rel=0.1)
    ledger = sum(path.stat().st_size for path in (tmp_path / "out").rglob("block-*"))
    assert disk["ledger"] == pytest.approx(ledger, rel=0.25)
    stages = found["ways"][0]["seconds"].keys() - {"evaluate"}
    assert stages == report["seconds"].keys() - {"data"}


def test_no_weight_is_read(asked, here, tmp_path):
    expected = foretell(asked)
    path = Path(asked.model) / "model.safetensors"
    whole = path.read_bytes()
    size = sum(entry.nbytes for entry in header(path).values())
    path.write_bytes(whole[:-size] + b"\xff" * size)  # NaN, which a run refuses
    try:
        found = foretell(asked)
    finally:
        path.write_bytes(whole)
    for key in ("bits_per_weight", "disk_bytes", "weights", "terms"):
        assert found[key] == expected[key]


def test_ranks_share_the_work_and_no_more_are_shown_than_there_are_batches(asked):
    found = foretell(asked)
    ways = {(way["ranks"], way["streamed"]): way["seconds"] for way in found["ways"]}
    assert {*ways} == {(ranks, streamed) for ranks in (1, 2, 4) for streamed in (False, True)}
    for stage in ("observe", "quantize"):
        assert ways[1, False][stage] > ways[2, False][stage] >= ways[4, False][stage]
    # Four batches of 256 windows: each of two ranks has half of them.
    assert ways[2, False]["observe"] == pytest.approx(ways[1, False]["observe"] / 2)
    assert foretell(replace(asked, nsamples=256))["ways"][-1]["ranks"] == 1


def test_a_model_is_streamed_where_it_would_fill_the_memory(asked, monkeypatch):
    assert not foretell(asked)["streams"]
    assert foretell(replace(asked, stream="on"))["streams"]
    monkeypatch.setattr(dry_run, "free_host_bytes", lambda: 100_000)
    found = foretell(asked)
    assert found["streams"]
    assert "this run streams the model" in forecast_words(found)
    assert not foretell(replace(asked, stream="off"))["streams"]


def test_blocks_that_stream_take_less_memory_and_are_read_once_more(asked, monkeypatch):
    monkeypatch.setattr(dry_run, "resident_bytes", lambda: 0)
    found = foretell(asked)
    whole, streamed = (
        next(way for way in found["ways"] if way["streamed"] == mode and way["ranks"] == 1)
        for mode in (False, True)
    )
    assert streamed["host_bytes"]["observe"] < whole["host_bytes"]["observe"]
    assert streamed["seconds"]["replay"] > whole["seconds"]["replay"]


def test_what_memory_is_free_decides_what_is_held(asked, monkeypatch):
    """Hidden states up to a quarter, or as is said."""

    def held(free: int, **own: float) -> dict[str, int]:
        monkeypatch.setattr(dry_run, "free_host_bytes", lambda: free)
        monkeypatch.setattr(activations, "free_host_bytes", lambda: free)
        ways = foretell(replace(asked, **own))["ways"]
        return next(way["host_bytes"] for way in ways if way["streamed"] and way["ranks"] == 1)

    monkeypatch.setattr(dry_run, "resident_bytes", lambda: 0)
    ample, short = held(2**40), held(0)
    hidden = foretell(replace(asked, out=Path("out")))["disk_bytes"]["hidden"]
    assert ample["quantize"] - short["quantize"] == hidden
    assert held(0, activation_memory=1.0)["quantize"] == short["quantize"] + hidden


def test_hidden_states_of_the_original_are_counted_where_targets_need_them(asked, tmp_path):
    asked = replace(asked, out=tmp_path)
    one, both = foretell(asked), foretell(replace(asked, target_shrink="auto"))
    assert both["disk_bytes"]["hidden"] == 2 * one["disk_bytes"]["hidden"]
    seconds = [found["ways"][0]["seconds"] for found in (one, both)]
    assert seconds[1]["observe"] > 2 * seconds[0]["observe"]


def test_a_store_takes_what_is_foretold(asked, tmp_path):
    asked = replace(asked, recipe=None, collects=True, save=tmp_path / "store", nsamples=8)
    found, (dataset, *_) = foretell(asked), asked.eval_datasets
    collected = collect_hessians(request(Collection, asked, dataset=dataset))
    assert found["disk_bytes"]["store"] == pytest.approx(collected.nbytes, rel=0.1)
    assert found["bits_per_weight"] is None


def test_what_a_recipe_cannot_do_is_refused_by_name(asked):
    odd = replace(RECIPE, group=None, codebook=STACKED.codebook)  # of eight columns at once
    narrow = replace(asked, recipe=replace(odd, transforms=()))
    assert foretell(narrow)["bits_per_weight"] > 2
    tiles = build_recipe(wbits=2, codebook="trellis", tile="7x3")
    with pytest.raises(UsageError, match=r"model\.layers\.0\."):
        foretell(replace(asked, recipe=tiles))


def test_weights_of_tokens_take_a_pass_and_second_moments_twice(asked):
    plain, weighed, rescaled = (
        foretell(replace(asked, **changes))["ways"][0]["seconds"]
        for changes in (
            {},
            {"token_weights": "fisher"},
            {"recipe": build_recipe(codebook="E8P12", pre_rescale_out=True)},
        )
    )
    assert "sensitivity" not in plain
    assert weighed["sensitivity"] > 0
    assert rescaled["sensitivity"] > 0
    assert weighed["observe"] > 0


def test_what_calibrates_nothing_takes_no_time_of_it(asked, tmp_path):
    (way,) = foretell(replace(asked, recipe=None, stream="off"))["ways"][:1]
    seconds = way["seconds"]
    assert (seconds["observe"], seconds["replay"], seconds["quantize"]) == (0, 0, 0)
    assert seconds["evaluate"] > 0
    (way,) = foretell(replace(asked, hessians=tmp_path))["ways"][:1]
    assert way["seconds"]["observe"] == 0 < way["seconds"]["quantize"]


def test_a_model_that_is_quantized_already_is_refused_as_the_run_would(asked, here):
    words = json.loads((here / "llama" / "config.json").read_text())
    packed = here / "packed"
    packed.mkdir()
    config = {**words, "quantization_config": {"quant_method": "quip"}}
    (packed / "config.json").write_text(json.dumps(config))
    for how in ({}, {"recipe": None, "collects": True}):
        with pytest.raises(UnsupportedModel, match="packed is quantized already; give the orig"):
            foretell(replace(asked, model=str(packed), **how))


def test_the_rates_of_this_machine_are_measured(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(2**20))
    found = rates.measured_rates(
        torch.device("cpu"), torch.bfloat16, path, tmp_path / "not" / "yet"
    )
    assert all(rate > 0 for rate in vars(found).values())
    assert [*tmp_path.iterdir()] == [path]


def test_what_is_left_of_two_matrices_is_split_between_columns_and_weights():
    left = Left.fit({64: rates.COLUMNS * (2.0 + 64 * 0.5), 512: rates.COLUMNS * (2.0 + 512 * 0.5)})
    assert (left.column, left.weight) == (2.0, 0.5)
    assert Left.fit({64: 3.0}).of(64, rates.COLUMNS) == pytest.approx(3.0)


def test_a_line_is_told_instead_of_run(asked, here, quip, tmp_path):
    line = ("run", asked.model, here / "text.txt", "--wbits", 3, "--nsamples", 8, "--seqlen", 16)
    line += ("--eval_datasets", "none", "--out", tmp_path / "out", "--device", "cpu")
    status, out, _ = quip(*line, "--dry_run")
    assert status == 0
    assert out.splitlines()[0].startswith(f"{asked.model} on cpu in float32: 28 matrices")
    assert out.count("in memory") == out.count("streamed") + 1  # which this run does, it says
    status, out, _ = quip(*line, "--dry_run", "--json")
    assert json.loads(out)["ways"][0]["ranks"] == 1
    status, _, (err,) = quip(*line, "--json")
    assert status == 2
    assert "add --dry_run" in err
    assert not (tmp_path / "out").exists()
    status, out, _ = quip(
        *("hessians", asked.model, here / "text.txt", "--save", tmp_path / "out", "--dry_run")
    )
    assert (status, (tmp_path / "out").exists()) == (0, False)
    assert "store" in out


def test_embedding_and_head_are_counted_as_they_will_be_packed(asked, tmp_path):
    asked = replace(asked, model="demo", eval_datasets=(), save=tmp_path / "saved")
    plain, packed = (
        foretell(replace(asked, head_bits=bits))["disk_bytes"]["checkpoint"] for bits in (None, 6)
    )
    model = load_model("demo").model
    (record,) = pack_tables(model, 6, device="cpu")
    weights = record.rows * record.columns
    assert plain - packed == int(weights * (2 - record.bits_per_weight / 8))
