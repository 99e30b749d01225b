"""A whole walk towards W*: nearer to the original, and the same codes however it is walked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quip.errors import UsageError
from quip.jobs.experiment import Experiment, settled
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from quip.matrix.recipe import Recipe
from quip.model import aim
from quip.model.ledger import Ledger
from quip.model.matrices import find_blocks
from quip.model.quantize import quantize_matrix_by_matrix, quantize_model
from quip.model.run import Run
from quip.model.team import ALONE, Team
from quip.model.tune.blocks import BlockTuning
from quip.model.twin import Twin
from quip.packed.digests import bytes_of
from quip.packed.experts import unfuse
from tests.support.mixtures import mixture
from tests.support.processes import in_team
from tests.support.runs import save_model, write_text
from tests.support.tiny import digest, tiny, tokens

RECIPE = build_recipe(quant="ldlq", wbits=2, incoh_processing=True)
LATTICE = build_recipe(codebook="E8P12")  # whose siblings are stacked
BATCH = 2


def walked(shrink: Any, *, recipe: Recipe = LATTICE, name: str = "llama", **how: Any) -> list[Any]:
    """The digest of the model, and its records without seconds."""
    model = tiny(name)
    run = Run(recipe=recipe, seed=0, device="cpu", batch_size=BATCH, target_shrink=shrink, **how)
    records = [*quantize_matrix_by_matrix(model, tokens(), run)]
    return [digest(model), [replace(record, seconds=0.0) for record in records]]


@cache
def alone(shrink: Any, recipe: Recipe = LATTICE) -> list[Any]:
    return walked(shrink, recipe=recipe)


@pytest.mark.parametrize("recipe", [RECIPE, LATTICE], ids=["each", "stacks"])
def test_a_share_of_0_is_a_walk_without_any(recipe):
    assert walked(0.0, recipe=recipe) == alone(None, recipe)


@torch.no_grad()
def test_blocks_pass_on_less_error_the_more_is_made_up_for():
    """On the calibration windows, which are many for a model of so few inputs."""
    windows = tokens(40)

    def hidden(shrink: float | None) -> torch.Tensor:
        model = tiny("llama")
        if shrink is not None:
            quantize_model(
                *(model, windows, RECIPE), device="cpu", seed=0, batch_size=20, target_shrink=shrink
            )
        kept: list[torch.Tensor] = []
        find_blocks(model)[1][-1].register_forward_hook(lambda _, args, y: kept.append(y))
        model(input_ids=windows)
        return kept[0]

    expected = hidden(None)
    errors = [float((hidden(a) - expected).square().mean()) for a in (0.0, 0.5, 1.0)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize(("recipe", "shrink"), [(RECIPE, 0.5), (LATTICE, 0.5), (LATTICE, "auto")])
def test_records_say_both_losses_and_the_share(recipe, shrink):
    _, records = alone(shrink, recipe)
    for record in records:
        assert 0 <= record.target_share <= 1
        assert shrink == "auto" or record.target_share == shrink
    first, others = records[:3], records[3:]  # q, k and v of the first block see what is right
    assert all(record.target_loss == record.proxy_loss for record in first)
    if shrink != "auto":
        assert all(record.target_loss != record.proxy_loss for record in others)
    assert all(record.target_loss is None for record in alone(None, recipe)[1])


def test_auto_chooses_by_windows_that_are_held_out_evenly_in_any_team():
    assert aim.Shrink.of("auto", 40, 4, ALONE).held == {9, 19, 29, 39}
    assert aim.Shrink.of("auto", 7, 2, ALONE).held == {2, 5}  # two at least
    shares = [aim.Shrink.of("auto", 40, 4, Team(rank, 3)).held for rank in range(3)]
    windows = torch.arange(40)
    own = [Team(rank, 3).share(windows, 4).tolist() for rank in range(3)]
    found = {own[rank][i] for rank, held in enumerate(shares) for i in held}
    assert found == {9, 19, 29, 39}
    with pytest.raises(UsageError, match=r"^--target_shrink auto with 3 windows: 2 of at least 4"):
        aim.Shrink.of("auto", 3, 1, ALONE)


def test_two_processes_make_the_codes_of_one():
    for found in in_team(2, lambda team: walked("auto", team=team)):
        assert found == alone("auto")


class Broken(Exception):
    """Ends a walk."""


@contextmanager
def broken_off_in_the_third_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real, turns = Twin.observe_lacking, count()

    def until_the_third_block(*args, **how):
        if next(turns) == 9:  # each block has four groups
            raise Broken
        return real(*args, **how)

    with monkeypatch.context() as patched:
        patched.setattr(Twin, "observe_lacking", until_the_third_block)
        with pytest.raises(Broken):
            yield


def test_a_run_taken_up_ends_bitwise_as_one_that_was_not_broken_off(tmp_path, monkeypatch):
    with broken_off_in_the_third_block(monkeypatch):
        walked("auto", ledger=opened(tmp_path))
    kept = load_file(tmp_path / "blocks" / "hidden.safetensors")["hidden"]
    assert kept.shape[:2] == (7, 2)  # windows of both models
    assert walked("auto", ledger=opened(tmp_path)) == alone("auto")


def opened(folder: Path) -> Ledger:
    found = Ledger(folder / "blocks", {"of": "this run"})
    found.open()
    return found


def test_experts_are_rounded_towards_their_weights():
    model = mixture("qwen2-moe")
    records = quantize_model(
        *(model, tokens(), RECIPE), device="cpu", seed=0, batch_size=BATCH, target_shrink=0.5
    )
    for record in records:
        assert (record.target_share is None) == (".experts." in record.name)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Experiment:
    place = tmp_path_factory.mktemp("asked")
    e = Experiment(
        model=save_model(place / "model", "llama"),
        dataset=write_text(place / "text.txt"),
        recipe=LATTICE,
        target_shrink="auto",
        nsamples=5,
        seqlen=16,
        stream="off",
        out=place / "out",
    )
    run_experiment(e)
    return e


def test_it_is_the_same_streamed_with_hidden_states_in_a_file(asked, tmp_path):
    run_experiment(replace(asked, stream="on", activation_memory=1e-6, out=tmp_path / "out"))
    blocks = [sorted((out / "blocks").glob("block-*")) for out in (asked.out, tmp_path / "out")]
    assert len(blocks[0]) == 4
    for one, other in zip(*blocks, strict=True):
        assert weights_of(one) == weights_of(other)


def weights_of(path: Path) -> dict[str, bytes]:
    return {name: bytes(bytes_of(x)) for name, x in load_file(path).items()}


def test_a_run_with_another_share_is_not_taken_up(asked):
    with pytest.raises(UsageError, match="target_shrink"):
        run_experiment(replace(asked, target_shrink=0.5, resume=True))


def test_what_targets_do_not_go_with_is_refused(asked):
    with pytest.raises(UsageError, match="--target_shrink auto with --hessians"):
        settled(replace(asked, dataset=None, hessians=Path("store")))


TUNING = BlockTuning(epochs=2, lr=1e-3, signs_lr=3e-3, batch_size=2, held_out=0.3)


@pytest.mark.slow
@torch.no_grad()
def test_tuned_blocks_are_nearer_to_what_the_original_makes_of_its_own_inputs():
    windows, lost = tokens(40), {}

    def hidden(model: torch.nn.Module) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        find_blocks(model)[1][-1].register_forward_hook(lambda _, args, y: kept.append(y))
        model(input_ids=windows)
        return kept[0]

    expected = hidden(tiny("llama"))
    for tuning in (None, TUNING):
        model = tiny("llama")
        quantize_model(
            *(model, windows, LATTICE),
            device="cpu",
            seed=0,
            batch_size=20,
            tuning=tuning,
            target_shrink="auto",
        )
        lost[tuning] = float((hidden(model) - expected).square().mean())
    assert lost[TUNING] < 0.9 * lost[None]


@pytest.mark.parametrize("shrink", ["auto", pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_original_stays_as_it_is_while_its_twin_is_tuned(monkeypatch, shrink):
    """What the walk passes on of the original are its own hidden states, bit for bit."""
    model, passed = tiny("llama"), []
    real = Twin.replay

    def replay(self):
        real(self)
        passed.append(self._states.original.clone())

    monkeypatch.setattr(Twin, "replay", replay)
    run = Run(
        recipe=LATTICE, seed=0, device="cpu", batch_size=BATCH, target_shrink=shrink, tuning=TUNING
    )
    [*quantize_matrix_by_matrix(model, tokens(), run)]
    tuned, passed[:] = list(passed), []
    [*quantize_matrix_by_matrix(tiny("llama"), tokens(), replace(run, tuning=None))]
    assert len(tuned) == len(passed) > 1
    assert all(torch.equal(a, b) for a, b in zip(tuned, passed, strict=True))


def test_a_tuned_run_of_two_processes_and_one_taken_up_are_the_same(tmp_path, monkeypatch):
    expected = walked("auto", tuning=TUNING)
    for found in in_team(2, lambda team: walked("auto", tuning=TUNING, team=team)):
        assert found == expected
    with broken_off_in_the_third_block(monkeypatch):
        walked("auto", tuning=TUNING, ledger=opened(tmp_path))
    assert walked("auto", tuning=TUNING, ledger=opened(tmp_path)) == expected


@torch.no_grad()
def test_a_share_lies_between_the_outputs_of_the_block_and_of_its_twin(monkeypatch):
    """Of the second block, whose inputs differ."""
    found: dict[float, torch.Tensor] = {}
    real = Twin.part

    def part(self, share):
        if self.index == 1:
            found.update({x: real(self, x).clone() for x in (1.0, 0.25)}, now=self.outputs())
        return real(self, share)

    monkeypatch.setattr(Twin, "part", part)
    walked(0.25, tuning=TUNING)
    expected = torch.lerp(found["now"], found[1.0], 0.25)
    torch.testing.assert_close(found[0.25], expected)
    assert float((found[1.0] - found["now"]).abs().max()) > 1e-3


@pytest.mark.parametrize("stream", ["off", "on"])
def test_blocks_beyond_the_hidden_states_end_the_same(asked, tmp_path, monkeypatch, stream):
    """Those are written less often where they are large; what a block was is read again."""
    e = replace(asked, stream=stream, out=tmp_path / "out")
    with broken_off_in_the_third_block(monkeypatch):
        run_experiment(e)
    (e.out / "blocks" / "hidden.safetensors").unlink()
    run_experiment(replace(e, resume=True))
    blocks = [sorted((out / "blocks").glob("block-*")) for out in (asked.out, e.out)]
    assert len(blocks[0]) == 4
    for one, other in zip(*blocks, strict=True):
        assert weights_of(one) == weights_of(other)


def test_experts_are_tuned_in_a_paired_walk():
    run = Run(
        recipe=RECIPE,
        seed=0,
        device="cpu",
        batch_size=BATCH,
        target_shrink="auto",
        tuning=TUNING,
    )
    model = mixture("qwen2-moe")
    unfuse(model)
    records = [*quantize_matrix_by_matrix(model, tokens(), run)]
    assert any(".experts." in record.name for record in records)
    assert run.tuned
    assert all(record.loss_after <= record.loss_before for record in run.tuned)
