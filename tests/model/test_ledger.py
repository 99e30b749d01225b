"""Runs that are killed and taken up again: the same codes, whatever the moment."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as tensors_of
from torch import Tensor, nn

from quip.errors import Unavailable, UsageError
from quip.jobs import evaluate
from quip.jobs.experiment import Experiment
from quip.jobs.report.folder import RunFolder
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from quip.matrix.recipe import Recipe
from quip.model import ledger as resume
from quip.model import ledger_files, quantize, siblings
from quip.model.fingerprints import differences
from quip.model.ledger import Ledger
from quip.model.progress import Progress
from quip.model.quantize import quantize_matrix_by_matrix
from quip.model.run import Run
from quip.packed import shards
from quip.packed.checkpoint import load
from quip.packed.digests import SEAL
from quip.packed.linear import QuantizedLinear
from tests.support.checkpoints import VECTORS
from tests.support.damage import clear, flip, halve, spread, tensor_at, text_at, unsigned
from tests.support.runs import save_model, write_text
from tests.support.tiny import tiny, tokens

RECIPE = build_recipe(quant="ldlq", wbits=2, incoh_processing=True)
BLOCKS = 4  # of the tiny models


def killed(work: Callable[[], object]) -> bool:
    """Whether a process that does this work, a copy of this one, dies of SIGKILL."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)  # without what pytest would do at the end
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill(*args: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def quantized(
    ledger: Ledger | None, name: str = "llama", recipe: Recipe = RECIPE
) -> tuple[nn.Module, list]:
    model = tiny(name)
    run = Run(recipe=recipe, device="cpu", seed=0, ledger=ledger)
    return model, list(quantize_matrix_by_matrix(model, tokens(), run))


def stored(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for key, tensor in layer.stored().items()
    }


def assert_equal(ours: nn.Module, expected: nn.Module) -> None:
    ours, expected = stored(ours), stored(expected)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def ledger(folder: Path, **fingerprint) -> Ledger:
    made = Ledger(folder, fingerprint)
    made.open()
    return made


@pytest.fixture(scope="module", params=["llama", "opt"])
def whole(request):
    """A run that nothing interrupts: the architecture, its model and its records."""
    return request.param, *quantized(None, request.param)


# The moments of a run: what is called when it is killed, and how often it was called before.
MOMENTS = {
    "in the first block": ("quip.model.siblings._record", 2),
    "in the middle of a block": ("quip.model.siblings._record", 10),
    "in the last block": ("quip.model.siblings._record", 23),
    "before a block is written": ("quip.model.ledger.Ledger.keep", 1),
    "while a block is written": ("quip.model.ledger_files.save_file", 3),
    "before hidden states are written": ("quip.model.ledger.Ledger.keep_hidden", 1),
    "before the last hidden states are forgotten": ("quip.model.ledger.Ledger.forget_hidden", 0),
}


@pytest.mark.parametrize(("call", "before"), MOMENTS.values(), ids=MOMENTS.keys())
def test_a_run_killed_at_any_moment_ends_bitwise_as_one_that_was_not(
    whole, tmp_path, monkeypatch, call, before
):
    name, expected, records = whole
    owner, _, attribute = call.rpartition(".")
    target = {
        "quip.model.siblings": siblings,
        "quip.model.ledger_files": ledger_files,
        "quip.model.ledger.Ledger": Ledger,
    }[owner]
    real, calls = getattr(target, attribute), []

    def sometimes(*args, **options):
        calls.append(call)
        if len(calls) > before:
            if attribute == "save_file":
                Path(args[1]).write_bytes(b"half of it")
            kill()
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(target, attribute, sometimes)
        assert killed(lambda: quantized(ledger(tmp_path), name))
    model, again = quantized(ledger(tmp_path), name)
    assert_equal(model, expected)
    unclocked = [replace(record, seconds=0.0) for record in again]
    assert unclocked == [replace(record, seconds=0.0) for record in records]
    assert len(list(tmp_path.glob("block-*"))) == BLOCKS


@pytest.mark.parametrize(("name", "dim"), [("opt", "1D"), ("llama", "2D"), ("qwen2", "4D")])
def test_learned_codebooks_are_taken_up_bitwise(name, dim, tmp_path, monkeypatch):
    recipe = build_recipe(**VECTORS[dim], vq_seed="kpp")
    expected, _ = quantized(None, name, recipe)
    real, calls = siblings._record, []

    def sometimes(*args, **options):
        calls.append(name)
        if len(calls) > 15:
            kill()
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(siblings, "_record", sometimes)
        assert killed(lambda: quantized(ledger(tmp_path), name, recipe))
    assert len(list(tmp_path.glob("block-*"))) == 2
    model, _ = quantized(ledger(tmp_path), name, recipe)
    assert_equal(model, expected)


def test_finished_blocks_are_not_quantized_again(tmp_path, monkeypatch):
    seen: list[int] = []
    real = quantize._quantize_block

    def watched(block, *args):
        seen.append(block.index)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(block, *args)

    monkeypatch.setattr(quantize, "_quantize_block", watched)
    with pytest.raises(KeyboardInterrupt):
        quantized(ledger(tmp_path))
    quantized(ledger(tmp_path))
    assert seen == [0, 1, 2, 2, 3]


def test_the_disk_holds_the_hidden_states_of_one_block_and_none_in_the_end(tmp_path, monkeypatch):
    sizes: list[int] = []
    real = Ledger.keep_hidden

    def watched(self, block, hidden):
        real(self, block, hidden)
        sizes.append(sum(p.stat().st_size for p in tmp_path.glob("*hidden*")))
        assert sizes[-1] < hidden.nbytes + 200  # a header
        assert self.hidden()[0] == block

    monkeypatch.setattr(Ledger, "keep_hidden", watched)
    quantized(ledger(tmp_path))
    assert len(sizes) == BLOCKS - 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"fingerprint.json", *(f"block-000{i}.safetensors" for i in range(BLOCKS))}


def test_large_hidden_states_are_written_when_it_is_time_and_replayed_otherwise(
    whole, tmp_path, monkeypatch
):
    name, expected, _ = whole
    clock = itertools.count(0, 100)  # seconds: what a write takes, and ten times it until the next
    monkeypatch.setattr(resume.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(resume, "LARGE", 0)
    real, entered = Progress.keep_hidden, []

    def watched(self, block, hidden):
        real(self, block, hidden)
        entered.append((block, self.ledger.entered))
        if len(entered) == BLOCKS - 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "keep_hidden", watched)
    with pytest.raises(KeyboardInterrupt):
        quantized(ledger(tmp_path), name)
    assert entered == [(1, 1), (2, 1), (3, 1)]
    assert_equal(quantized(ledger(tmp_path), name)[0], expected)


def test_another_fingerprint_is_refused_with_every_difference(tmp_path):
    ledger(tmp_path / "blocks", recipe={"bits": 2, "name": "x"}, seed=0)
    other = Ledger(tmp_path / "blocks", {"recipe": {"bits": 3, "name": "x"}, "seed": 0, "more": 1})
    with pytest.raises(UsageError, match=r"recipe.bits was 2, is now 3; more was None, is now 1"):
        other.open()
    assert differences({"a": [1]}, {"a": [1]}) == ""


def test_a_damaged_fingerprint_is_named(tmp_path):
    path = ledger(tmp_path, seed=0).folder / "fingerprint.json"
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(Unavailable, match=r"gerprint.json is damaged \(.*\); start over with --ov"):
        ledger(tmp_path)


# Damage


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory) -> Path:
    """The ledger of a run of three blocks out of four."""
    folder = tmp_path_factory.mktemp("ledgers") / "blocks"
    real = quantize._quantize_block

    def broken(block, *args):
        if block.index == BLOCKS - 1:
            raise KeyboardInterrupt
        return real(block, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quantize, "_quantize_block", broken)
        with pytest.raises(KeyboardInterrupt):
            quantized(ledger(folder), "opt")
    return folder


NORM = "model.decoder.layers.1.final_layer_norm.weight"
BLOCK, HIDDEN = "block-0001.safetensors", "hidden.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{
        f"bit {i} of 12 of the block": (BLOCK, lambda path, i=i: flip(path, spread(path, 12)[i]))
        for i in range(12)
    },
    "codes": (BLOCK, lambda path: flip(path, tensor_at(path, "model.decoder.layers.1.fc1.codes"))),
    "step": (BLOCK, lambda path: flip(path, tensor_at(path, "model.decoder.layers.1.fc2.step"))),
    "norm": (BLOCK, lambda path: flip(path, tensor_at(path, NORM))),
    "name of a record": (BLOCK, lambda path: flip(path, text_at(path, "proxy_loss"))),
    "number of a record": (BLOCK, lambda path: flip(path, text_at(path, "rows") + 8, bit=0)),
    "layout": (BLOCK, lambda path: flip(path, text_at(path, "codebook"))),
    "tuned": (BLOCK, lambda path: flip(path, text_at(path, '"tuned') + 1)),
    "name of a tensor": (
        BLOCK,
        lambda path: flip(path, text_at(path, "model.decoder.layers.1.fc1.codes")),
    ),
    "braces": (BLOCK, lambda path: flip(path, 8)),
    "length of the header": (BLOCK, lambda path: flip(path, 0)),
    "page of the block": (BLOCK, clear),
    "half of the block": (BLOCK, halve),
    "all of the block": (BLOCK, lambda path: path.write_bytes(b"")),
    **{
        f"bit {i} of 3 of the hidden states": (HIDDEN, lambda p, i=i: flip(p, spread(p, 3)[i]))
        for i in range(3)
    },
    "their block": (HIDDEN, lambda path: flip(path, text_at(path, '"3"') + 1, bit=0)),
    "their block is none": (HIDDEN, lambda path: flip(path, text_at(path, '"3"') + 1, bit=6)),
    "page of the hidden states": (HIDDEN, clear),
    "half of the hidden states": (HIDDEN, halve),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_was_damaged_is_as_good_as_none_and_is_named(broken_off, tmp_path, caplog, case):
    folder = Path(shutil.copytree(broken_off, tmp_path / "blocks"))
    name, damage = DAMAGE[case]
    damage(folder / name)
    found = ledger(folder)
    start, _ = found.hidden()
    assert [found.has(i) for i in range(BLOCKS)] == [True, name != BLOCK, True, False]
    assert start == (3 if name == BLOCK else 0)
    [line] = caplog.messages
    assert line.startswith(f"{folder / name} is damaged (")
    assert line.endswith("); it is made again")


@pytest.mark.parametrize("case", ["codes", "name of a record", "bit 1 of 3 of the hidden states"])
def test_a_run_taken_up_after_damage_ends_bitwise_as_one_without(
    broken_off, tmp_path, monkeypatch, case
):
    folder = Path(shutil.copytree(broken_off, tmp_path / "blocks"))
    name, damage = DAMAGE[case]
    damage(folder / name)
    seen: list[int] = []
    real = quantize._quantize_block
    monkeypatch.setattr(
        quantize, "_quantize_block", lambda block, *x: seen.append(block.index) or real(block, *x)
    )
    model, records = quantized(ledger(folder), "opt")
    assert seen == ([1, 3] if name == BLOCK else [3])
    expected, known = quantized(None, "opt")
    assert_equal(model, expected)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[key], x) for key, x in theirs.items())
    unclocked = [replace(record, seconds=0.0) for record in records]
    assert unclocked == [replace(record, seconds=0.0) for record in known]
    assert len(list(folder.glob("block-*"))) == BLOCKS


def test_a_finished_block_that_was_damaged_is_quantized_again_though_all_are_there(tmp_path):
    _, known = quantized(ledger(tmp_path), "opt")
    path = tmp_path / BLOCK
    whole = {name: x.clone() for name, x in tensors_of(path).items()}
    flip(path, tensor_at(path, "model.decoder.layers.1.fc1.codes"))
    assert any(not torch.equal(x, whole[name]) for name, x in tensors_of(path).items())
    _, again = quantized(ledger(tmp_path), "opt")
    assert [replace(x, seconds=0.0) for x in again] == [replace(x, seconds=0.0) for x in known]
    assert all(torch.equal(x, whole[name]) for name, x in tensors_of(path).items())


def test_a_file_that_cannot_be_read_is_not_thrown_away(broken_off, tmp_path):
    folder = Path(shutil.copytree(broken_off, tmp_path / "blocks"))
    path = folder / BLOCK
    path.unlink()
    path.mkdir()
    with pytest.raises(Unavailable, match=rf"{BLOCK} is damaged \(.*\); start over with --overwr"):
        ledger(folder)
    assert path.exists()


def test_files_of_older_versions_are_taken_unverified_which_is_said_once(
    broken_off, tmp_path, caplog
):
    folder = Path(shutil.copytree(broken_off, tmp_path / "blocks"))
    for path in folder.glob("*.safetensors"):
        unsigned(path, SEAL)
    found = ledger(folder)
    assert found.hidden()[0] == BLOCKS - 1
    assert caplog.messages == [f"{folder}: files of an older quip bear no digest, unverified"]
    assert all(map(found.has, range(BLOCKS - 1)))


# Whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "opt")


@pytest.fixture
def plan(model, tmp_path):
    train, test = (write_text(tmp_path / f"{name}.txt") for name in ("train", "test"))

    def make(**changes) -> Experiment:
        defaults = {
            "model": model,
            "dataset": train,
            "recipe": RECIPE,
            "nsamples": 8,
            "seqlen": 16,
            "device": "cpu",
            "eval_datasets": (test,),
            "eval_nsamples": 3,
            "out": tmp_path / "run",
        }
        return Experiment(**{**defaults, **changes})

    return make


@pytest.mark.slow
def test_a_run_killed_in_its_evaluation_goes_on_there(plan, tmp_path, monkeypatch):
    expected = run_experiment(plan(out=tmp_path / "whole", save=tmp_path / "whole-saved"))
    calls: list[str] = []
    real = evaluate.perplexity

    def second(*args, **options) -> float:
        calls.append("perplexity")
        return kill() if len(calls) == 2 else real(*args, **options)

    plans = plan(save=tmp_path / "saved", compare=True)
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "perplexity", second)
        assert killed(lambda: run_experiment(plans))
    before = (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(evaluate, "perplexity", lambda *a, **o: calls.append("") or real(*a, **o))
    report = run_experiment(replace(plans, resume=True))
    assert len(calls) == 1  # the original's is known, and was not measured again
    assert report["status"] == "complete"
    assert report["perplexity"] == expected["perplexity"]
    assert "quantize" not in report["seconds"]
    assert (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "saved" / "run.json").read_text())["status"] == "complete"
    assert_equal(load(tmp_path / "saved"), load(tmp_path / "whole-saved"))
    assert len(report["matrices"]) == 24


def test_a_run_killed_while_it_saves_leaves_nothing_under_the_name(plan, tmp_path, monkeypatch):
    plans = plan(save=tmp_path / "saved")
    with monkeypatch.context() as patched:
        patched.setattr(shards, "narrowed", kill)
        assert killed(lambda: run_experiment(plans))
    assert not (tmp_path / "saved").exists()
    report = run_experiment(replace(plans, resume=True))
    assert "quantize" not in report["seconds"]
    assert stored(load(tmp_path / "saved"))
    assert not list(tmp_path.glob(".saved*"))  # what was half written is gone


def test_a_finished_run_can_be_saved_later_without_quantizing(plan, tmp_path):
    run_experiment(plan())
    report = run_experiment(plan(resume=True, save=tmp_path / "saved"))
    assert not {"quantize", "evaluate"} & report["seconds"].keys()
    assert stored(load(tmp_path / "saved"))


CHANGES = {
    "recipe": {"recipe": build_recipe(quant="ldlq", wbits=3, incoh_processing=True)},
    "seed": {"seed": 1},
    "calibration": {"nsamples": 9},
    "dtype": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_of_something_else_is_not_taken_up(plan, tmp_path, name):
    run_experiment(plan())
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(UsageError, match=rf"was another one \({name}\.?.* was .*, is now "):
        run_experiment(plan(resume=True, **CHANGES[name]))
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_another_model_of_the_same_shape_is_not_taken_up(plan, tmp_path):
    run_experiment(plan())
    other = save_model(tmp_path / "other", model__decoder__layers__0__fc1__bias=0.5)
    with pytest.raises(UsageError, match=r"\(model.weights was \w+, is now \w+\)"):
        run_experiment(plan(model=other, resume=True))


def test_a_model_that_computes_otherwise_is_not_taken_up(plan, model, tmp_path):
    run_experiment(plan())
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "activation_function": "gelu"}))
    with pytest.raises(UsageError, match=r"\(model.config was \w+, is now \w+\)"):
        run_experiment(plan(model=str(other), resume=True))


@pytest.mark.parametrize("damage", [halve, lambda path: flip(path, -1)], ids=["half", "a bit"])
def test_a_checkpoint_that_was_damaged_meanwhile_is_saved_again(plan, tmp_path, damage):
    run_experiment(plan(save=tmp_path / "saved"))
    weights = tmp_path / "saved" / "model.safetensors"
    whole = weights.read_bytes()
    damage(weights)
    flip(tmp_path / "run" / RunFolder.BLOCKS / "block-0002.safetensors", -1)
    run_experiment(plan(save=tmp_path / "saved", resume=True))
    assert weights.read_bytes() == whole


def test_resume_without_an_earlier_run_is_a_first_run(plan, tmp_path):
    assert run_experiment(plan(resume=True))["status"] == "complete"
    with pytest.raises(UsageError, match=r"holds an earlier run; take it up with --resume"):
        run_experiment(plan())
    assert run_experiment(plan(overwrite=True))["seconds"]["quantize"] > 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run_experiment(plan(out=tmp_path / "mine", resume=True))


def test_a_checkpoint_of_another_run_is_not_written_over_by_a_resumed_one(plan, tmp_path):
    run_experiment(plan(out=tmp_path / "first", save=tmp_path / "saved", seed=1))
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"--save .*saved: it exists and is not empty"):
        run_experiment(plan(save=tmp_path / "saved", resume=True))
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before


def test_two_runs_cannot_write_to_one_folder(plan, tmp_path):
    running = RunFolder(tmp_path / "run")
    running.open()
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=r"--out .*run: another run is writing to it"):
            run_experiment(plan(**options))
    running.release()
    assert run_experiment(plan())["status"] == "complete"


def test_a_process_that_is_killed_leaves_a_run_that_can_be_taken_up(quip, model, tmp_path):
    """kill -9 between two blocks, as soon as the first is written."""
    train = write_text(tmp_path / "train.txt")
    line = ["run", model, train, "--wbits", "2", "--incoh_processing"]
    line += ["--nsamples", "8", "--seqlen", "16", "--eval_datasets", "none"]
    first = subprocess.Popen(
        [sys.executable, "-m", "quip", *line, "--out", tmp_path / "run"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as here
        stderr=subprocess.DEVNULL,
    )
    block = tmp_path / "run" / "blocks" / "block-0000.safetensors"
    while not block.exists() and first.poll() is None:
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    status, _, err = quip(*line, "--out", tmp_path / "run", "--resume")
    assert status == 0, err
    status, _, err = quip(*line, "--out", tmp_path / "whole")
    assert status == 0, err
    for path in (tmp_path / "whole" / "blocks").glob("block-*"):
        ours, expected = (ledger_files.read_sealed(p)[0] for p in (block.parent / path.name, path))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)
