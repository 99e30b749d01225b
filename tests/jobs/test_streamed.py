"""A run whose model is streamed makes the codes, the report and the checkpoint of any other."""

import json
import os
import signal
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quip.errors import Unavailable, UsageError
from quip.jobs import streaming
from quip.jobs.experiment import Experiment
from quip.jobs.hessians import Collection, collect_hessians
from quip.jobs.inspect import inspect_checkpoint
from quip.jobs.report.lock import LOCK
from quip.jobs.requests import request
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from quip.model import ledger_files
from quip.model.ledger import Ledger
from quip.model.load import load_model
from quip.model.tune import BlockTuning
from quip.packed import shards
from quip.packed.checkpoint import load
from tests.support.runs import save_model, write_text
from tests.support.tiny import tokens

RECIPES = {
    "opt": build_recipe(quant="ldlq", wbits=2, incoh_processing=True),
    "llama": build_recipe(codebook="E8P12"),
}


class Killed(BaseException):
    """Ends a run where it stands, as a signal would."""


def whole_run(place: Path, kind: str) -> Experiment:
    """A run, not streamed, that has been run."""
    e = Experiment(
        model=save_model(place / "model", kind),
        dataset=write_text(place / "text.txt"),
        recipe=RECIPES[kind],
        nsamples=5,
        seqlen=16,
        stream="off",
        out=place / "out",
        save=place / "saved",
    )
    run_experiment(e)
    return e


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Experiment:
    return whole_run(tmp_path_factory.mktemp("opt"), "opt")


def streamed(asked: Experiment, place: Path, **changes: object) -> Experiment:
    return replace(asked, stream="on", out=place / "out", save=place / "saved", **changes)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, from all of its files."""
    return {k: x for path in folder.glob("*.safetensors") for k, x in load_file(path).items()}


def assert_same(folder: Path, expected: Path) -> None:
    """Two checkpoints hold the same tensors and the same words."""
    ours, theirs = tensors(folder), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (x.dtype, x.shape), name
        assert torch.equal(ours[name].view(-1).view(torch.uint8), x.view(-1).view(torch.uint8))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / name).read_text() == (expected / name).read_text()


def records(folder: Path) -> list[dict]:
    rows = json.loads((folder / "run.json").read_text())["matrices"]
    return [{**row, "seconds": 0} for row in rows]


def test_a_streamed_run_saves_the_checkpoint_of_one_that_is_not(asked, tmp_path):
    run_experiment(streamed(asked, tmp_path))
    assert_same(tmp_path / "saved", asked.save)
    assert records(tmp_path / "saved") == records(asked.save)
    fingerprints = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("out/*/finger*"))]
    assert fingerprints == [json.loads((asked.out / "blocks/fingerprint.json").read_text())]


def test_stacks_of_a_streamed_run_are_saved_too(tmp_path):
    asked = whole_run(tmp_path / "whole", "llama")
    run_experiment(streamed(asked, tmp_path))
    assert_same(tmp_path / "saved", asked.save)


def test_its_files_are_the_blocks_of_the_run_and_every_reader_takes_them(asked, tmp_path):
    run_experiment(streamed(asked, tmp_path))
    blocks = sorted((tmp_path / "out" / "blocks").glob("block-*"))
    parts = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(parts) == len(blocks) + 1
    for block, part in zip(blocks, parts, strict=False):
        assert os.path.samefile(block, part)
    found = inspect_checkpoint(tmp_path / "saved", verify_tensors=True)["verification"]
    assert (found["damaged"], found["unsigned"]) == (0, [])
    assert found["tensors"] == len(tensors(tmp_path / "saved"))
    expected = load(asked.save)(input_ids=tokens(2)).logits
    assert torch.equal(load(tmp_path / "saved")(input_ids=tokens(2)).logits, expected)
    again = load_model(str(tmp_path / "saved"), stream="on")
    assert again.stream
    assert dict(again.stream.state(again.model)).keys() == load(asked.save).state_dict().keys()


def test_where_links_cannot_be_the_blocks_are_copied(asked, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(shards.os, "link", refused)
    run_experiment(streamed(asked, tmp_path))
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "saved").glob("*.safetensors"))
    assert_same(tmp_path / "saved", asked.save)


@pytest.mark.parametrize(
    "turns", [("on", "off"), ("off", "on"), pytest.param(("on", "on"), marks=pytest.mark.slow)]
)
def test_a_run_is_taken_up_either_way(asked, tmp_path, monkeypatch, turns):
    first, second = turns
    e = streamed(asked, tmp_path)
    real = ledger_files.save_file

    def killed(held, path, **options):
        if "block-0002" in path.name:
            raise Killed
        real(held, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(ledger_files, "save_file", killed)
        with pytest.raises(Killed):
            run_experiment(replace(e, stream=first))
    run_experiment(replace(e, stream=second, resume=True))
    assert_same(tmp_path / "saved", asked.save)
    assert records(tmp_path / "saved") == records(asked.save)


def test_a_damaged_block_in_the_middle_is_made_again(asked, tmp_path):
    e = streamed(asked, tmp_path)
    run_experiment(replace(e, save=None))
    path = tmp_path / "out/blocks/block-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run_experiment(replace(e, resume=True))
    assert_same(tmp_path / "saved", asked.save)
    assert records(tmp_path / "saved") == records(asked.save)


def test_without_out_the_blocks_are_in_a_temporary_folder_and_it_says_so(asked, tmp_path, caplog):
    run_experiment(replace(asked, stream="on", out=None, save=tmp_path / "saved"))
    assert "there is no --out: finished blocks are in" in caplog.text
    assert_same(tmp_path / "saved", asked.save)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_temporary_folder_goes_whole_also_where_a_signal_comes_meanwhile(tmp_path, monkeypatch):
    def ended(*_):
        raise Killed

    def interrupted(folder, real=streaming.shutil.rmtree, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        real(folder, **options)

    before, threads = signal.signal(signal.SIGUSR1, ended), {*threading.enumerate()}
    ledger = streaming.TemporaryLedger(tmp_path, {}, None)
    monkeypatch.setattr(streaming.shutil, "rmtree", interrupted)
    ledger.remove.detach()
    ledger.remove = weakref.finalize(ledger, interrupted, ledger.folder.parent)
    with pytest.raises(Killed), streaming.no_longer_than_this(ledger):
        pass
    signal.signal(signal.SIGUSR1, before)
    for thread in {*threading.enumerate()} - threads:
        thread.join(60)
    assert [*tmp_path.iterdir()] == []


def test_folders_of_processes_that_were_killed_go_when_the_next_one_starts(tmp_path):
    def old(ledger: Ledger) -> Path:
        folder = ledger.folder.parent
        os.utime(folder / LOCK, (0, 0))
        return folder

    running = streaming.TemporaryLedger(tmp_path, {}, None)
    kept = old(running)
    killed = tmp_path / ".quip-blocks-killed"
    (killed / "blocks").mkdir(parents=True)
    (killed / LOCK).touch()  # just made: by a process that has yet to lock it
    others = tmp_path / ".quip-blocks-others"
    others.mkdir()
    first = streaming.TemporaryLedger(tmp_path, {}, None)
    assert {*tmp_path.iterdir()} == {kept, killed, others, first.folder.parent}
    os.utime(killed / LOCK, (0, 0))
    streaming.remove_abandoned(tmp_path)
    assert {*tmp_path.iterdir()} == {kept, others, first.folder.parent}
    running.remove()
    first.remove()
    assert [*tmp_path.iterdir()] == [others]


def test_what_is_saved_was_verified(asked, tmp_path, monkeypatch):
    e = streamed(asked, tmp_path)

    def damaged(*args, **options):
        path = tmp_path / "out/blocks/block-0003.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        return save(*args, **options)

    from quip.jobs import run

    save = run.save_with_notes
    monkeypatch.setattr(run, "save_with_notes", damaged)
    with pytest.raises(Unavailable, match=r"block-0003\.safetensors is damaged"):
        run_experiment(e)
    assert not e.save.exists()


def test_hidden_states_beyond_the_limit_live_in_a_file_to_the_same_codes(
    asked, tmp_path, monkeypatch
):
    mapped, real = [], torch.from_file
    monkeypatch.setattr(
        torch, "from_file", lambda name, **how: (mapped.append(Path(name)), real(name, **how))[1]
    )
    run_experiment(streamed(asked, tmp_path, activation_memory=1e-6))
    assert {path.parent for path in mapped} == {tmp_path / "out" / "blocks"}
    assert not any(path.exists() for path in mapped)
    assert_same(tmp_path / "saved", asked.save)


def test_tuning_is_the_same_streamed_and_with_outputs_in_a_file(asked, tmp_path):
    tuning = BlockTuning(epochs=1, batch_size=2)
    asked = replace(asked, tuning=tuning, overwrite=True)
    run_experiment(replace(asked, out=tmp_path / "whole", save=tmp_path / "expected"))
    run_experiment(streamed(asked, tmp_path, activation_memory=1e-6))
    assert_same(tmp_path / "saved", tmp_path / "expected")


def test_a_store_is_the_same_and_so_is_what_is_quantized_from_it(asked, tmp_path):
    how = {"model": asked.model, "dataset": asked.dataset, "nsamples": 5, "seqlen": 16}
    for mode in ("off", "on"):
        collect_hessians(Collection(**how, save=tmp_path / f"store-{mode}", stream=mode))
        run_experiment(
            replace(
                asked,
                dataset=None,
                hessians=tmp_path / "store-off",
                stream=mode,
                out=tmp_path / f"out-{mode}",
                save=tmp_path / f"saved-{mode}",
            )
        )
    whole, ours = (sorted((tmp_path / f"store-{x}").glob("*.safetensors")) for x in ("off", "on"))
    assert [path.name for path in ours] == [path.name for path in whole]
    for a, b in zip(whole, ours, strict=True):
        with safe_open(a, "pt") as x, safe_open(b, "pt") as y:
            assert all(torch.equal(x.get_tensor(k), y.get_tensor(k)) for k in x.keys())  # noqa: SIM118
    assert_same(tmp_path / "saved-on", tmp_path / "saved-off")


def test_a_disk_without_room_is_refused_with_numbers(asked, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UsageError, match=r"writes at least 0\.0 GB there, and 0\.0 GB are free"):
        run_experiment(streamed(asked, tmp_path))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(streaming.tempfile, "gettempdir", lambda: str(tmp_path))
    nowhere = replace(streamed(asked, tmp_path), out=None, save=None)
    with pytest.raises(UsageError, match="set TMPDIR to one on another disk, or give fewer"):
        run_experiment(nowhere)


def test_of_experts_that_are_not_there_nobody_speaks(asked, tmp_path):
    said = rf"--all_experts: {asked.model} has no experts; leave it out"
    with pytest.raises(UsageError, match=said):
        run_experiment(replace(streamed(asked, tmp_path), all_experts=True))
    with pytest.raises(UsageError, match=said):
        collect_hessians(request(Collection, asked, save=tmp_path / "store", all_experts=True))
    assert [*tmp_path.iterdir()] == []


def test_a_disk_that_fills_up_ends_in_one_line_and_the_run_is_taken_up(
    asked, tmp_path, monkeypatch
):
    e, real = streamed(asked, tmp_path), ledger_files.save_file

    def full(held, path, **options):
        if "block-0002" in path.name:
            raise OSError(28, "No space left on device")
        real(held, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(ledger_files, "save_file", full)
        with pytest.raises(Unavailable, match=r"block-0002.* cannot be written .No space left"):
            run_experiment(e)
    run_experiment(replace(e, resume=True))
    assert_same(tmp_path / "saved", asked.save)
