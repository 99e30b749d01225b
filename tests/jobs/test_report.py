"""What a run leaves behind: whole files or none, valid JSON, and a table that a person can read."""

import csv
import json
import math
from pathlib import Path

import pytest

from quip.errors import Unavailable, UsageError
from quip.jobs.report import plots
from quip.jobs.report.folder import RunFolder
from quip.jobs.report.lock import LOCK
from quip.jobs.report.plots import plot_losses
from quip.jobs.report.report import Report, peak_memory, summary
from quip.jobs.report.text import table
from quip.model.records import MatrixRecord, versions

PNG = b"\x89PNG"


def record(block: int, role: str, *, rows: int = 4, bits: float = 2.5, loss: float = 0.1):
    return MatrixRecord(
        name=f"model.layers.{block}.{role}",
        block=block,
        rows=rows,
        columns=8,
        proxy_loss=loss,
        damp=0.01,
        bits_per_weight=bits,
        seconds=0.5,
    )


RECORDS = [record(0, "up"), record(0, "down", rows=12, bits=3.5, loss=0.3), record(1, "up")]


def strict(path: Path) -> dict:
    """The file's JSON, if it is JSON: Python alone accepts the words NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_folder_is_made_when_it_is_first_written_to(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    folder.write_report({"model": "demo"})
    assert strict(tmp_path / "a" / "b" / "run.json") == {"model": "demo"}


def visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != LOCK]


def test_a_folder_that_is_not_empty_is_refused_unless_it_may_be_overwritten(tmp_path):
    RunFolder(tmp_path)  # empty
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"--out .*not empty; .* add --overwrite"):
        RunFolder(tmp_path)
    RunFolder(tmp_path, overwrite=True).write_report({})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_path_that_can_be_no_folder_is_refused_at_once(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="it is a file; name a folder"):
        RunFolder(file, overwrite=True)
    with pytest.raises(UsageError, match=r"file is no folder that can be written to"):
        RunFolder(file / "below")


def test_an_overwritten_folder_never_mixes_two_runs(tmp_path):
    first = RunFolder(tmp_path)
    first.write_layers(RECORDS)
    first.write_report({"run": 1})
    first.release()
    second = RunFolder(tmp_path, overwrite=True)
    assert (tmp_path / "layers.csv").exists()  # nothing is lost before there is something new
    second.write_report({"run": 2})
    assert visible(tmp_path) == ["run.json"]


def test_numbers_that_json_lacks_are_words_and_paths_are_text(tmp_path):
    found = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "e": (None, True)}
    RunFolder(tmp_path).write_report({**found, "out": tmp_path})
    assert strict(tmp_path / "run.json") == {
        "a": "nan",
        "b": ["inf", 1.5],
        "c": {"d": "-inf"},
        "e": [None, True],
        "out": str(tmp_path),
    }
    assert float("nan") != float("nan")
    assert float("inf") == math.inf  # as they are read back


def test_a_write_that_fails_leaves_the_file_before_it_and_no_other(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write_report({"run": 1})

    def full(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(Unavailable, match=r"run.json cannot be written \(No space left"):
        folder.write_report({"run": 2})
    assert visible(tmp_path) == ["run.json"]
    assert strict(tmp_path / "run.json") == {"run": 1}


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(figure: object, path: Path, **options: object) -> None:
        path.write_bytes(PNG)
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).write_layers(RECORDS)
    assert visible(tmp_path) == ["layers.csv"]


def test_layers_are_a_table_with_a_row_for_each_matrix_and_a_picture(tmp_path):
    RunFolder(tmp_path).write_layers(RECORDS)
    rows = list(csv.DictReader((tmp_path / "layers.csv").open(newline="")))
    assert [row["name"] for row in rows] == [r.name for r in RECORDS]
    assert list(rows[0]) == list(MatrixRecord.__dataclass_fields__)
    assert [float(row["proxy_loss"]) for row in rows] == [0.1, 0.3, 0.1]
    assert (tmp_path / "layers.png").read_bytes().startswith(PNG)


def test_the_picture_shows_bits_where_a_plan_makes_them_differ(tmp_path, monkeypatch):
    titles = []

    def seen(figure, *_: object, **options: object) -> None:
        titles.append([axes.get_title() for axes in figure.axes])

    monkeypatch.setattr("quip.jobs.report.plots.save_figure", seen)
    beside = [record(0, "up"), record(0, "down", rows=12, bits=2.3)]  # more beside the codes
    by_role = [record(0, "up"), record(0, "down", rows=12, bits=3.0)]
    by_block = [record(0, "up"), record(1, "up", bits=2.75)]
    for records in (beside, by_role, by_block):
        plots.plot_losses(records, tmp_path)
    alone, *mixed = titles
    assert alone == ["Error of each quantized matrix"]
    for both in mixed:
        assert both[:2] == ["Error of each quantized matrix", "Bits per weight"]


def test_without_matplotlib_there_is_no_picture_and_no_complaint(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda package: None)
    RunFolder(tmp_path).write_layers(RECORDS)
    assert visible(tmp_path) == ["layers.csv"]


@pytest.mark.parametrize("loss", [0.0, math.nan, math.inf])
def test_losses_that_no_axis_can_show_are_no_obstacle(tmp_path, loss):
    plot_losses([record(0, "up", loss=loss), record(1, "up")], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_totals_weigh_bits_by_size():
    assert summary(RECORDS) == {
        "matrices": 3,
        "weights": 160,
        "bits_per_weight": pytest.approx((2.5 * 32 + 3.5 * 96 + 2.5 * 32) / 160),
        "mean_proxy_loss": pytest.approx(0.5 / 3),
        "max_proxy_loss": 0.3,
    }


def test_a_report_is_whole_after_every_stage_and_says_why_it_ended(tmp_path):
    report = Report({"model": "demo"}, folder=RunFolder(tmp_path), device="cpu")
    report.save("started")
    assert strict(tmp_path / "run.json")["status"] == "started"
    report.save_matrices("quantized", RECORDS)
    with pytest.raises(ValueError, match="no more"), report.kept():
        raise ValueError("no more")
    written = strict(tmp_path / "run.json")
    assert (written["status"], written["error"]) == ("failed", "ValueError: no more")
    assert [matrix["name"] for matrix in written["matrices"]] == [r.name for r in RECORDS]
    assert written["peak_memory"]["host_gb"] > 0.05
    assert written["model"] == "demo"


def test_a_report_without_a_folder_is_only_kept():
    report = Report({}, folder=None, device="cpu")
    report.save_matrices("quantized", RECORDS)
    assert report.entries["totals"]["matrices"] == 3


def test_the_table_shows_both_perplexities_and_the_change():
    lines = table(
        {
            "model": "demo",
            "method": "ldlq, 2 bits",
            "totals": summary(RECORDS),
            "original_perplexity": {"pydoc": 20.0, "c4": 10.0},
            "perplexity": {"pydoc": 25.0, "c4": math.inf},
            "seconds": {"load": 1.25},
            "peak_memory": {"host_gb": 0.5},
        }
    ).splitlines()
    assert lines[0] == "demo  ldlq, 2 bits"
    assert lines[1] == "3 matrices at 3.100 bits per weight, mean proxy loss 0.167"
    assert lines[3].split() == ["perplexity", "original", "quantized", "change"]
    assert lines[4].split() == ["pydoc", "20", "25", "+25.0%"]
    assert lines[5].split() == ["c4", "10", "inf", "-"]
    assert lines[-2:] == ["time: load 1.2 s", "peak memory: host 0.50 GB"]
    assert len({len(line) for line in lines[3:6]}) == 1  # columns stand under one another


def test_the_table_of_one_model_has_one_column_and_prints_nan():
    name = "a/very/long/path/to/a/file/of/text.txt"
    lines = table({"model": "m", "method": "as it is", "perplexity": {name: math.nan}}).splitlines()
    assert lines[2] == "perplexity"
    assert lines[3].split() == [name, "nan"]


def test_the_table_says_on_how_much_it_was_measured_and_zero_has_no_sign():
    stamp = {"windows": 2, "seqlen": 2048}
    report = {
        "model": "m",
        "method": "x",
        "evaluation": {"a": stamp, "b": stamp, "c": stamp},
        "windows": {"a": {"measured": 2, "of": 141}, "b": {"measured": 2, "of": 2}},
        "perplexity": {"a": 20.001, "b": 19.999, "c": 30.0},
        "original_perplexity": {"a": 20.0, "b": 20.0, "c": 20.0},
        "tasks": {"piqa": {"acc": 0.5, "samples": 7}},
        "tuned": [{"within_noise": True}, {"within_noise": False}, {}],
    }
    text = table(report)
    lines = {line.split()[0]: line.split()[3:] for line in text.splitlines() if line}
    assert lines["a"] == ["0.0%", *["2", "of", "141", "windows", "x", "2048", "tokens"]]
    assert lines["b"] == ["0.0%", *["2", "windows", "x", "2048", "tokens"]]
    assert lines["c"] == ["+50.0%", *["2", "windows", "x", "2048", "tokens"]]
    assert "acc 0.5  (7 samples)" in text
    assert "3 tunings of blocks, of which 1 gained nothing beyond noise" in text
    assert table({**report, "original_perplexity": {}}).count("2 of 141 windows x 2048 tokens") == 1


def test_versions_name_python_and_the_packages():
    assert {"python", "torch", "transformers", "quip-quant"} <= versions().keys()


def test_peak_memory_is_that_of_this_process_in_gb():
    assert 0.1 < peak_memory("cpu")["host_gb"] < 100
