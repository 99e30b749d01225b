"""The cells of a table: run once, taken up after a kill, shared between tables, never mixed."""

import json
from dataclasses import replace

import pytest

from quip.errors import Unavailable, UsageError
from quip.research.tables import entries as shown
from quip.research.tables import quantized, stored
from quip.research.tables.cells import Settings, cells
from quip.research.tables.description import FOLDER, Measure, read_table
from quip.research.tables.entries import entries
from quip.research.tables.record import record_of
from quip.research.tables.running import run_missing
from quip.research.tables.selection import select, settle
from tests.support.runs import save_model, write_text
from tests.support.tables import OWN


@pytest.fixture
def own(tmp_path):
    """A table of one's own, its models, settings and folder: what it takes to run it."""
    (tmp_path / "mine.yaml").write_text(OWN)
    table = read_table(str(tmp_path / "mine.yaml"))
    model, text = save_model(tmp_path / "tiny"), write_text(tmp_path / "text.txt")
    settings = Settings(dataset=text, evaluate=(text,), nsamples=4, seqlen=16)
    return settle(table, settings), [model], settings, tmp_path / "out"


def test_rows_and_columns_are_chosen_by_label_and_a_difference_keeps_what_it_needs(own):
    table = own[0]
    chosen = select(table, rows=("gain",), columns=("2 bits",))
    assert [row.label for row in chosen.rows] == ["Near", "QuIP", "gain"]
    assert [column.label for column in chosen.columns] == ["2 bits"]
    with pytest.raises(UsageError, match="--rows Far: mine has original; Near"):
        select(table, rows=("Far",))


def test_a_row_without_bits_to_choose_is_one_cell(own):
    assert len(list(cells(*own))) == 5  # the original once, two methods at two widths


def test_data_that_are_named_take_the_place_of_the_tables(own):
    table, _, settings, _ = own
    [measure] = table.measures
    assert (measure.label, measure.path) == ("text", ("perplexity", settings.evaluate[0]))
    mean = read_table("processing")
    assert settle(mean, settings).measures == mean.measures
    tasks = Settings(dataset="pydoc", tasks=("piqa", "quip_demo_cloze"))
    found = settle(read_table("zeroshot"), tasks).measures
    assert [m.path for m in found] == [
        ("tasks", "piqa", "acc_norm"),
        ("tasks", "quip_demo_cloze", "acc"),
    ]


def test_missing_cells_are_run_and_no_cell_is_run_twice(own, monkeypatch):
    table, models, settings, root = own
    one = select(table, columns=("2 bits",))
    run_missing(list(cells(one, models, settings, root)))
    assert all(e.state == "done" for e in entries(one, models, settings, root))
    assert not list(root.glob("cells/*/*/blocks"))

    ran, run = [], quantized.run_experiment
    monkeypatch.setattr(quantized, "run_experiment", lambda asked: ran.append(asked) or run(asked))
    run_missing(list(cells(table, models, settings, root)))
    assert [e.method for e in ran] == [
        "wbits=4 quant=nearest",
        "wbits=4 quant=ldlq incoh_processing=True",
    ]
    other = replace(settings, seqlen=8)
    assert len([c for c in cells(table, models, other, root) if c.missing()]) == 5


def test_tables_share_the_cells_of_equal_flags_in_any_order(own):
    table, models, settings, root = own
    [cell] = cells(select(table, rows=("QuIP",), columns=("2 bits",)), models, settings, root)
    ranges = settle(read_table("range"), settings)
    row = "column, best of ten by squared error"
    [same] = cells(select(ranges, rows=(row,), columns=("2 bits",)), models, settings, root)
    assert same.folder == cell.folder


def test_another_model_or_text_under_the_same_name_is_another_cell(own, tmp_path):
    before = [cell.folder for cell in cells(*own)]
    assert [cell.folder for cell in cells(*own)] == before
    write_text(tmp_path / "text.txt", letters=700)
    changed = [cell.folder for cell in cells(*own)]
    assert set(changed) & set(before) == {before[0]}  # the original is not calibrated
    (tmp_path / "tiny" / "config.json").touch()
    assert not set(changed) & {cell.folder for cell in cells(*own)}


@pytest.mark.slow
def test_tables_of_other_data_add_to_a_cell_and_take_nothing_from_it(own, tmp_path):
    table, models, settings, root = own
    one = select(table, rows=("QuIP",), columns=("2 bits",))
    run_missing(list(cells(one, models, settings, root)))
    [first] = [e.ours for e in entries(one, models, settings, root)]

    other = replace(settings, evaluate=(write_text(tmp_path / "other.txt"),))
    two = settle(one, other)
    run_missing(list(cells(two, models, other, root)))
    [second] = [e.ours for e in entries(two, models, other, root)]
    assert [e.ours for e in entries(one, models, settings, root)] == [first]

    both = replace(settings, evaluate=(*settings.evaluate, *other.evaluate))
    mean = settle(read_table("processing"), both)
    row = "the same, range by column"
    mean = select(mean, rows=(row,), columns=("2 bits",))
    assert [e.ours for e in entries(mean, models, both, root)] == [(first + second) / 2]
    assert len(list(root.glob("cells/*/*"))) == 1

    write_text(tmp_path / "other.txt", letters=700)  # another text under that name
    assert [e.ours for e in entries(two, models, other, root)] == [None]
    assert [e.ours for e in entries(one, models, settings, root)] == [first]


@pytest.mark.slow
def test_a_difference_or_ratio_is_that_of_its_two_rows(own):
    table, models, settings, root = own
    run_missing(list(cells(table, models, settings, root)))
    ours = {(e.row, e.column): e.ours for e in entries(table, models, settings, root)}
    near, quip = ours["Near", "2 bits"], ours["QuIP", "2 bits"]
    assert (ours["gain", "2 bits"], ours["share", "2 bits"]) == (near - quip, near / quip)


def test_the_numbers_of_another_model_stand_beside_ours_and_judge_nothing(own, monkeypatch):
    table, models, settings, root = own
    measure = Measure(label="Wiki", path=("mean_perplexity",))
    one = select(table, rows=("original",), columns=("2 bits",))
    one = replace(one, beside="OPT-125m", measures=(measure,))
    [cell] = cells(one, models, settings, root)
    cell.write({"perplexity": {settings.evaluate[0]: 1e6}})
    cell.keep()
    [beside] = entries(one, models, settings, root)
    assert (beside.ours, beside.paper, beside.state) == (1e6, 27.66, "done")
    monkeypatch.setattr(shown, "papers_name", lambda model: "OPT-125m")
    [judged] = entries(one, models, settings, root)
    assert (judged.paper, judged.state) == (27.66, "missed")


def test_a_row_that_is_published_alone_is_no_cell(own, tmp_path):
    _, models, settings, root = own
    row = "  Other: {published: true, paper: {method: Near, processing: baseline}}\n"
    (tmp_path / "mine.yaml").write_text(OWN.replace("  gain:", f"{row}  gain:"))
    table = replace(read_table(str(tmp_path / "mine.yaml")), beside="OPT-125m")
    folders = [cell.folder for cell in cells(own[0], models, settings, root)]
    assert [cell.folder for cell in cells(table, models, settings, root)] == folders
    [entry] = entries(select(table, rows=("Other",), columns=("2 bits",)), models, settings, root)
    assert (entry.ours, entry.paper, entry.state) == (None, 5375.0, "none")


def test_the_mean_accuracy_is_that_of_all_tasks_asked_for(own):
    table, models, settings, root = own
    one = select(table, rows=("original",), columns=("2 bits",))
    for tasks, mean in ((("a", "b"), 0.5), (("b",), 0.75), (("a", "c"), None), ((), None)):
        [cell] = cells(one, models, replace(settings, tasks=tasks), root)
        cell.write({"tasks": {"a": {"acc": 0.25}, "b": {"acc": 0.75}}})
        assert cell.report()["mean_accuracy"] == mean


def test_what_fails_is_noted_and_the_others_are_run(own, tmp_path):
    table, models, settings, root = own
    table = select(table, rows=("original",))
    wanted = list(cells(table, ["./nowhere/model", *models], settings, root))
    with pytest.raises(Unavailable, match=r"1 of 2 cells failed.*no such file or folder"):
        run_missing(wanted)
    assert [cell.missing() == () for cell in wanted] == [False, True]


def test_data_that_are_none_are_refused_before_the_first_cell(own):
    table, models, _, root = own
    with pytest.raises(UsageError, match="unknown data set 'wikitxt2'"):
        run_missing(list(cells(table, models, Settings(dataset="wikitxt2"), root)))


def test_a_run_that_was_stopped_goes_on_and_ends_like_one_that_was_not(own, monkeypatch):
    table, models, settings, root = own
    [cell] = cells(select(table, rows=("QuIP",), columns=("2 bits",)), models, settings, root)
    from quip.jobs import run as experiment

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "measure_perplexities", stop)
        with pytest.raises(KeyboardInterrupt):
            run_missing([cell])
    assert cell.missing()
    assert list(cell.folder.glob("blocks/block-*.safetensors"))
    run_missing([cell])
    stopped = cell.report()["perplexity"]
    [again] = cells(
        select(table, rows=("QuIP",), columns=("2 bits",)), models, settings, root / "other"
    )
    run_missing([again])
    assert again.report()["perplexity"] == stopped


@pytest.mark.slow
def test_losses_of_all_cells_are_measured_in_one_pass_over_one_store(own, monkeypatch):
    _, models, settings, root = own
    table = select(read_table("proxy"), rows=("Near", "LDLQ", "LDLQ + IncP"), columns=("2 bits",))
    settings = replace(settings, evaluate=())
    passes = []
    measure = stored.measure_losses
    monkeypatch.setattr(
        stored, "measure_losses", lambda *asked: passes.append(1) or measure(*asked)
    )
    run_missing(list(cells(table, models, settings, root)))
    ours = {e.row: e.ours for e in entries(table, models, settings, root)}
    assert ours["LDLQ"] < ours["Near"]
    assert len(passes) == len(list(root.glob("hessians/*/manifest.json"))) == 1


@pytest.mark.slow
def test_any_rows_may_stand_in_a_table_of_losses(own, tmp_path):
    _, models, settings, root = own
    rows = """
  lattice: {codebook: E8P12}
  bounded: {quant: ldlbal_admm, wbits: 2}
  matrix: {incoh_processing: true, range: tensor, wbits: 2}
columns: {all: {}}
"""
    text = (FOLDER / "proxy.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text[: text.index("rows:")] + "rows:" + rows)
    settings = replace(settings, evaluate=())
    table = read_table(str(tmp_path / "own.yaml"))
    run_missing(list(cells(table, models, settings, root)))
    ours = [e.ours for e in entries(table, models, settings, root)]
    assert len(ours) == 3
    assert all(0 < value < 1 for value in ours)


def test_statistics_of_hessians_are_those_of_a_summary(own):
    _, models, settings, root = own
    table, settings = read_table("hessians"), replace(settings, evaluate=())
    run_missing(list(cells(table, models, settings, root)))
    ours = {(e.row, e.measure): e.ours for e in entries(table, models, settings, root)}
    assert 0 < ours["baseline", "rank"] <= 1
    assert ours["baseline", "rank"] == pytest.approx(ours["IncP", "rank"], abs=0.1)
    assert ours["IncP", "incoherence"] >= 1


@pytest.mark.slow
def test_throughput_is_that_of_the_packed_model_and_its_checkpoint_is_not_kept(own):
    _, models, settings, root = own
    table = select(read_table("throughput"), rows=("OPTQ",), columns=("2 bits",))
    settings = replace(settings, evaluate=())
    run_missing(list(cells(table, models, settings, root)))
    found = entries(table, models, settings, root)
    assert [e.measure for e in found] == ["ms per token", "ms per token, dense", "% of bandwidth"]
    assert all(e.ours > 0 for e in found)
    assert not list(root.rglob("*.safetensors"))


def test_a_record_holds_no_path_of_the_machine(own, tmp_path):
    assert str(tmp_path) not in json.dumps(record_of(*own))
