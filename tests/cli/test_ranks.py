"""Commands by several processes, which nobody ends but they themselves, as on several machines."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import save_quantized
from tests.support.ranks import Ranks
from tests.support.runs import save_model, write_text

TUNE = ["--epochs", 1, "--nsamples", 7, "--seqlen", 16, "--batch_size", 3, "--lr", 1e-3]
RUN = ["--wbits", 2, "--nsamples", 3, "--seqlen", 4096]  # one window at a time


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_text(folder / "train.txt", letters=20_000)
    write_text(folder / "test.txt", letters=20_000)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "opt"
    save_quantized(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("models") / "opt", positions=4096)


def numbers(folder: Path, *, of: str) -> dict:
    """What run.json says, but for what no two runs have in common."""
    words = json.loads((folder / "run.json").read_text())[of]
    return {k: x for k, x in words.items() if k not in ("seconds", "flags")}


def tensors(path: Path) -> dict[str, bytes]:
    found = load_file(path)
    return {name: x.flatten().view(torch.uint8).numpy().tobytes() for name, x in found.items()}


def lines_of(said: list[list[str]]) -> list[str]:
    """What all processes say of why they end."""
    return [line for each in said for line in each if line.startswith("quip: ")]


@pytest.mark.slow
def test_a_checkpoint_is_tuned_by_two_to_the_bits_of_one(quip, checkpoint, texts, tmp_path):
    line = ["finetune", checkpoint, texts / "train.txt", "--teacher", f"{checkpoint}-original"]
    assert quip(*line, *TUNE, "--save", tmp_path / "one")[0] == 0
    both = [*line, *TUNE, "--save", tmp_path / "two"]
    with Ranks(both, both, folder=tmp_path) as ranks:
        ended = ranks.ended()
    assert ended.statuses == [0, 0], ended.said
    assert ended.said[1] == []  # the first speaks for both
    found = [tensors(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert found[0] == found[1]
    one, two = (numbers(tmp_path / name, of="finetune") for name in ("one", "two"))
    assert one == two


def test_what_differs_is_named_with_the_processes(checkpoint, texts, tmp_path):
    line = ["evaluate", checkpoint, "--datasets", texts / "test.txt", "--seqlen"]
    threads = [{}, {"OMP_NUM_THREADS": "2"}]
    with Ranks([*line, 16], [*line, 8], folder=tmp_path, environments=threads) as ranks:
        ended = ranks.ended()
    assert ended.statuses == [2, 2]
    (said,) = lines_of(ended.said)
    assert said.startswith("quip: the processes are not alike: asked for.seqlen: 16 in process 0 (")
    assert "| threads (OMP_NUM_THREADS): 1 in process 0 (" in said
    assert said.endswith("start all of them with the same program, flags and files")


def test_a_run_whose_second_process_is_killed_ends_and_is_taken_up_by_one(
    quip, original, texts, tmp_path
):
    evaluated = ["--eval_datasets", texts / "test.txt"]
    line = ["run", original, texts / "train.txt", *RUN, *evaluated]
    one, two = tmp_path / "one", tmp_path / "two"
    assert quip(*line, "--out", one)[0] == 0
    both = [*line, "--out", two]
    with Ranks(both, both, folder=tmp_path) as ranks:
        ranks.wait_for(two / "blocks" / "block-0000.safetensors")
        ranks.kill(1)
        ended = ranks.ended()
    assert ended.statuses[0] == 1
    (said,) = lines_of(ended.said)
    assert said.startswith("quip: process 1 (")
    assert "ended without a word" in said
    assert not list(two.rglob(".*"))  # neither locks nor files in part
    assert json.loads((two / "run.json").read_text())["status"] == "failed"
    assert quip(*line, "--out", two, "--resume")[0] == 0
    assert numbers(one, of="perplexity") == numbers(two, of="perplexity")
    for path in sorted((one / "blocks").glob("*.safetensors")):
        assert tensors(path) == tensors(two / "blocks" / path.name)


@pytest.mark.slow
def test_a_file_that_one_process_lacks_is_its_own_error(original, texts, tmp_path):
    there, lacking = tmp_path / "there", tmp_path / "lacking"
    there.mkdir()
    lacking.mkdir()
    (there / "model").symlink_to(original)
    line = ["evaluate", "./model", "--datasets", texts / "test.txt", "--seqlen", 16]
    with Ranks(line, line, folder=tmp_path, homes=[there, lacking]) as ranks:
        ended = ranks.ended()
    assert 0 not in ended.statuses
    (said,) = lines_of(ended.said)
    assert said.startswith("quip: process 1 (")
    assert "./model is no local folder" in said


def short_of_room() -> None:
    """No file may have more bytes than these."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.slow
def test_a_full_disk_of_the_first_ends_all(original, texts, tmp_path):
    both = ["run", original, texts / "train.txt", *RUN, "--eval_datasets", "none"]
    both += ["--out", tmp_path / "out", "--save", tmp_path / "saved"]
    with Ranks(both, both, folder=tmp_path, prepare=short_of_room) as ranks:
        ended = ranks.ended()
    assert ended.statuses == [1, 1]
    (said,) = lines_of(ended.said)
    assert "cannot be written (File too large)" in said
    assert not (tmp_path / "saved").exists()
