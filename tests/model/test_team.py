"""Several processes: what they quantize together is bitwise what one does, for any number."""

import gc
import os
import threading
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore

from quip.data.hessians import HessianStore
from quip.errors import NonFinite, UsageError
from quip.jobs.hessians import Collection, collect_hessians
from quip.matrix.build import build_recipe
from quip.matrix.hessian import Hessian
from quip.matrix.recipe import Recipe
from quip.model import team as teams
from quip.model.device import free_host_bytes
from quip.model.ledger import Ledger
from quip.model.quantize import quantize_from_store, quantize_matrix_by_matrix
from quip.model.run import Run
from quip.model.team import ALONE, Team
from tests.support import processes
from tests.support.checkpoints import VECTORS
from tests.support.processes import in_processes, in_team
from tests.support.runs import save_model, write_text
from tests.support.tiny import digest, tiny, tokens

BATCH = 2  # windows of a unit; of seven windows the last unit has one
CASES: dict[str, tuple[str, Recipe]] = {
    "incoherent": ("llama", build_recipe(wbits=2, incoh_processing=True)),
    "dead inputs, greedy": ("opt", build_recipe(wbits=3, quant="ldlqRG")),
    "stacks of a lattice": ("llama", build_recipe(codebook="E8P12")),
    "learned centroids": ("opt", build_recipe(**VECTORS["2D"])),
}
Found = tuple[str, list[dict[str, Any]]]


def without_seconds(records: list[Any]) -> list[dict[str, Any]]:
    return [asdict(record) | {"seconds": 0} for record in records]


def quantized(
    case: str, team: Team = ALONE, *, ledger: Ledger | None = None, blocks: int | None = None
) -> Found:
    """The digest of the model and the records; or it is broken off after so many blocks."""
    name, recipe = CASES[case]
    model, windows = tiny(name), tokens()
    run = Run(recipe=recipe, seed=0, device="cpu", batch_size=BATCH, ledger=ledger, team=team)
    records = []
    for record in quantize_matrix_by_matrix(model, windows, run):
        if record.block == blocks:
            break
        records.append(record)
    return digest(model), without_seconds(records)


@cache
def alone(case: str) -> Found:
    return quantized(case)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_tensors_and_records_are_those_of_one_process(case, size):
    assert in_team(size, lambda team: quantized(case, team)) == [alone(case)] * size


def test_sums_that_outgrow_their_anchors_are_observed_again_by_all():
    """The first window is padding, whose inputs are far smaller than those of all others."""
    padded = tokens()
    padded[:BATCH] = 0

    def job(team: Team, windows: Tensor = padded) -> tuple[Found, int]:
        passes = []
        model = tiny("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight[0] = 0
        model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
        run = Run(recipe=CASES["incoherent"][1], seed=0, device="cpu", batch_size=BATCH, team=team)
        records = list(quantize_matrix_by_matrix(model, windows, run))
        return (digest(model), without_seconds(records)), len(passes)

    found, passes = job(ALONE)
    assert passes == job(ALONE, tokens())[1] + 4  # batches
    assert [one for one, _ in in_team(2, job)] == [found] * 2


@pytest.mark.parametrize("sizes", [(2, 1), (1, 3), (3, 2)])
def test_a_run_is_taken_up_by_another_number_of_processes(tmp_path, sizes):
    def job(team: Team, blocks: int | None = None) -> Found:
        ledger = Ledger(tmp_path / "blocks", {}) if team.leads else None
        if ledger:
            ledger.open()
        return quantized("stacks of a lattice", team, ledger=ledger, blocks=blocks)

    before, after = sizes
    in_team(before, lambda team: job(team, blocks=2))
    assert len(list((tmp_path / "blocks").glob("block-*"))) == 2
    assert in_team(after, job) == [alone("stacks of a lattice")] * after
    assert in_team(2, job) == [alone("stacks of a lattice")] * 2  # with nothing left to do


def test_a_store_is_collected_and_quantized_from_as_by_one_process(tmp_path):
    model, text = save_model(tmp_path / "model"), write_text(tmp_path / "train.txt", 6000)

    def collect(folder: Path, **options: Any) -> None:
        collect_hessians(
            Collection(model=model, dataset=text, save=folder, nsamples=300, seqlen=16, **options)
        )

    def quantize(team: Team) -> Found:
        found, recipe = tiny("opt"), CASES["dead inputs, greedy"][1]
        run = Run(recipe=recipe, seed=0, device="cpu", team=team)
        records = list(quantize_from_store(found, HessianStore(tmp_path / "one"), run))
        return digest(found), without_seconds(records)

    how = {"recipe": CASES["incoherent"][1]}
    collect(tmp_path / "one")
    collect(tmp_path / "one quantized", **how)
    for name, options in (("one", {}), ("one quantized", how)):
        folder = tmp_path / name.replace("one", "two")
        made = in_processes(2, lambda folder=folder, how=options: collect(folder, **how))
        assert made == [None, None]
        assert {x.name: x.read_bytes() for x in folder.glob("*.*")} == {
            x.name: x.read_bytes() for x in (tmp_path / name).glob("*.*")
        }
    assert in_team(2, quantize) == [quantize(ALONE)] * 2


def test_more_processes_than_batches_are_refused_with_both_numbers():
    with pytest.raises(UsageError, match=r"5 processes for 4 batches \(7 windows, 2 at once\)"):
        quantized("incoherent", Team(0, 5))


def test_inputs_that_are_not_finite_are_named_by_every_process():
    def job(team: Team) -> None:
        model, windows = tiny("llama"), tokens()
        with torch.no_grad():
            model.model.embed_tokens.weight[5] = torch.nan
        windows[windows == 5] = 6
        windows[2, 3] = 5  # in the second unit, which the second process has
        run = Run(recipe=CASES["incoherent"][1], seed=0, device="cpu", batch_size=BATCH, team=team)
        list(quantize_matrix_by_matrix(model, windows, run))

    for error in in_team(2, job):
        assert isinstance(error, NonFinite)
        assert "model.layers.0.self_attn.q_proj: NaN or infinity" in str(error)


def test_sums_as_they_come_are_those_of_all_up_to_their_last_digits():
    x = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))

    def job(team: Team) -> Tensor | None:
        hessian = Hessian(70, exact=team.exact)
        hessian.update(team.share(x, 10))
        team.total(hessian, 1)
        return hessian.value() if team.rank == 1 else None

    nothing, found = in_team(2, job, exact=False)
    assert nothing is None
    torch.testing.assert_close(found, x.double().T @ x.double() / 40, rtol=0, atol=1e-6)


def test_a_team_shares_tells_spreads_and_gathers():
    x = torch.arange(21.0).view(7, 3)
    sent = {
        "bits": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
        "half": torch.full((2, 3), 0.1, dtype=torch.bfloat16),
        "one": torch.tensor(7, dtype=torch.int16),
    }

    def job(team: Team) -> dict[str, Any]:
        own = team.share(x, BATCH)
        mine = team.rank == 1
        return {
            "own": own,
            "whole": team.gather(own, BATCH),
            "scattered": team.scatter(x if team.leads else None, BATCH),
            "nothing": team.scatter(None, BATCH),
            "largest": team.largest(torch.tensor(team.rank)),
            "sum": team.sum(torch.tensor(team.rank)),
            "told": team.tell({"rank": team.rank}, of=2),
            "heard": team.hear(team.rank),
            "spread": team.spread(["words"] if mine else None, sent if mine else {}, 1),
        }

    found = in_team(3, job)
    assert [one["own"][:, 0].tolist() for one in found] == [[0, 3, 18], [6, 9], [12, 15]]
    assert torch.equal(found[0]["whole"], x)
    for one in found:
        assert torch.equal(one["scattered"], one["own"])
        assert (one["nothing"], one["told"], one["heard"]) == (None, {"rank": 2}, [0, 1, 2])
        assert (int(one["largest"]), int(one["sum"])) == (2, 3)
        words, tensors = one["spread"]
        assert words == ["words"]
        assert {k: (v.dtype, v.tolist()) for k, v in tensors.items()} == {
            k: (v.dtype, v.tolist()) for k, v in sent.items()
        }


def test_the_dearest_goes_first_and_each_to_whoever_has_least_to_do():
    assert Team(0, 2).owners({"a": 3.0, "b": 5.0, "c": 3.0, "d": 4.0}) == {
        "b": 0,
        "d": 1,
        "a": 1,
        "c": 0,
    }
    assert ALONE.owners({"a": 3.0, "b": 5.0}) == {"a": 0, "b": 0}


def test_all_processes_go_by_the_memory_of_the_one_with_the_least(monkeypatch):
    def own() -> int:
        return 900 - 100 * int(os.environ["RANK"])

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(teams, "free_host_bytes", own)
    assert in_team(2, lambda _: free_host_bytes()) == [400, 400]  # each half of a machine's


def test_a_forked_process_leaves_the_garbage_of_its_parent_alone():
    def member() -> int:
        for _ in range(8):  # of which one takes the place of the thread that the store waits for
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        return gc.collect()

    gc.disable()
    garbage: list[Any] = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    garbage.append(garbage)
    del garbage
    (found,) = in_processes(1, member)
    gc.enable()
    assert isinstance(found, int)  # or a TimeoutError


def test_a_team_that_stands_still_is_started_once_more_and_says_where_it_stood(
    tmp_path, monkeypatch
):
    def member() -> int:
        been = tmp_path / os.environ["RANK"]
        if not been.exists():
            been.touch()
            threading.Event().wait()
        return 1

    monkeypatch.setattr(processes, "PATIENCE", 2.0)
    with pytest.warns(UserWarning, match=r"all 2 processes stood still:\n(.*\n)+.* in member"):
        assert in_processes(2, member) == [1, 1]
