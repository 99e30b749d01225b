"""Stores collected from models: the very Hessians of a run, and codes that are bitwise its own."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quip.data import calibration_tokens, hessian_files
from quip.data import hessians as hessian_store
from quip.data.hessians import HessianStore, StoreWriter
from quip.errors import UnsupportedModel, UsageError
from quip.jobs.experiment import Experiment
from quip.jobs.hessians import Collected, Collection, collect_hessians
from quip.jobs.run import run_experiment
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.model import ledger as resume
from quip.model.ledger import Ledger
from quip.model.load import load_model
from quip.model.matrices import coverage, find_blocks, places
from quip.model.quantize import quantize_from_store, quantize_model
from quip.model.records import Stopwatch
from quip.model.run import Run
from tests.laws import assert_near
from tests.support.checkpoints import VECTORS
from tests.support.runs import write_text
from tests.support.tiny import tiny
from tests.support.tokenizer import save_tokenizer

DATA = {"nsamples": 6, "seqlen": 24}
RECIPES = {
    "gptq": build_recipe(quant="gptq", wbits=2, incoh_processing=True),
    "ldlq": build_recipe(quant="ldlq", wbits=2, incoh_processing=True),
    "ldlqRG": build_recipe(quant="ldlqRG", wbits=2, incoh_processing=True, npasses=2),
    "plain": build_recipe(quant="ldlq", wbits=3),
    "E8P12": build_recipe(quant="ldlq", codebook="E8P12"),
    **{name: build_recipe(**flags) for name, flags in VECTORS.items()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models of two blocks called opt, llama and qwen2, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("opt", "llama", "qwen2"):
        model = tiny(name)
        del find_blocks(model)[1][2:]
        model.config.num_hidden_layers = 2
        if name == "qwen2":
            model.config.layer_types = model.config.layer_types[:2]
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
    write_text(folder / "text.txt")
    return folder


def collect(
    folder: Path, save: Path, name: str = "opt", recipe: Recipe | None = None, **options
) -> Collected:
    asked = Collection(
        model=str(folder / name),
        dataset=str(folder / "text.txt"),
        save=save,
        recipe=recipe,
        device="cpu",
        **{**DATA, **options},
    )
    return collect_hessians(asked)


def experiment(folder: Path, name: str, recipe: Recipe, **options) -> Experiment:
    return Experiment(
        model=str(folder / name),
        dataset=None if "hessians" in options else str(folder / "text.txt"),
        recipe=recipe,
        device="cpu",
        **{**DATA, **options},
    )


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in ("opt", "llama") for how in RECIPES if how not in VECTORS),
        *zip(("opt", "llama", "qwen2"), VECTORS, strict=True),
    ],
)
def test_codes_from_a_store_of_the_quantized_model_are_bitwise_those_of_the_run(
    folder, tmp_path, name, how
):
    recipe = RECIPES[how]
    collect(folder, tmp_path, name, recipe)
    direct, stored = (load_model(str(folder / name)) for _ in range(2))
    ids = calibration_tokens(str(folder / "text.txt"), direct.tokenizer, seed=0, **DATA).ids
    quantize_model(direct.model, ids, recipe, device="cpu", seed=0, batch_size=4096 // 24)
    from_store(stored.model, tmp_path, recipe)
    expected, found = direct.model.state_dict(), stored.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def from_store(model: nn.Module, folder: Path, recipe: Recipe, seed: int = 0) -> Stopwatch:
    run = Run(recipe=recipe, device="cpu", seed=seed)
    list(quantize_from_store(model, HessianStore(folder), run))
    return run.watch


def inputs_of(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The inputs of every matrix of the blocks in one run of the whole model, a row a token."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.update({name: args[0].flatten(0, -2).double()})
        )
        for name in coverage(model).quantized
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_store_of_the_original_holds_the_moments_of_the_unquantized_model(folder, tmp_path, name):
    found = collect(folder, tmp_path / "store", name)
    store, loaded = HessianStore(tmp_path / "store"), load_model(str(folder / name))
    tokens = calibration_tokens(str(folder / "text.txt"), loaded.tokenizer, seed=0, **DATA)
    inputs = inputs_of(loaded.model, tokens.ids)
    assert {name for one in store.inputs for name in one.matrices} == inputs.keys()
    for matrix, x in inputs.items():
        moments = store.read(matrix)
        assert moments.count == len(x) == found.tokens
        assert_near(moments.H, x.T @ x / len(x), 1e-5)  # float32 sums of activations
        assert_near(moments.mean, x.mean(0), 1e-5)
    assert store.stamp == tokens.stamp
    assert store.manifest["source"] == "original"


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_codes_from_a_store_of_the_original_are_those_of_each_matrix_by_itself(
    folder, tmp_path, name
):
    recipe = RECIPES["ldlq"]
    collect(folder, tmp_path, name)
    store, original = HessianStore(tmp_path), load_model(str(folder / name)).model
    model = load_model(str(folder / name)).model
    from_store(model, tmp_path, recipe, seed=3)
    for matrix in coverage(original).quantized:
        W, H = original.get_parameter(f"{matrix}.weight").detach(), store.read(matrix).H
        expected = quantize_matrix(W, H, recipe, rng=rng_for(3, matrix), name=matrix)
        assert torch.equal(model.get_submodule(matrix).dequantize(), expected.dequantize())


def test_the_first_block_sees_the_same_in_every_store(whole):
    stores = [HessianStore(whole[source]) for source in ("original", "quantized")]
    assert [one.matrices for one in stores[0].inputs] == [one.matrices for one in stores[1].inputs]
    same = [
        (one.block, torch.equal(*(store.read(one.name).H for store in stores)))
        for one in stores[0].inputs
    ]
    assert same == [(block, block == 0) for block in range(2) for _ in range(4)]
    assert stores[1].manifest["source"]["codebook"]["bits"] == 3


# What is called when the collection is killed, and how often it was called before.
MOMENTS = {
    "before a block is written": (StoreWriter, "keep", 1),
    "while a block is written": (hessian_store, "save_file", 6),
    "before the manifest lists it": (StoreWriter, "_write", 2),
    "before hidden states are written": (Ledger, "keep_hidden", 0),
    "before the store is complete": (StoreWriter, "close", 0),
    "before the ledger is forgotten": (Ledger, "forget", 0),
}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> dict[str, Path]:
    """Stores of both sources that nothing interrupted."""
    made = {source: tmp_path_factory.mktemp(source) for source in ("original", "quantized")}
    collect(folder, made["original"])
    collect(folder, made["quantized"], recipe=RECIPES["plain"])
    return made


class Killed(BaseException):
    pass


@pytest.mark.parametrize("source", ["original", "quantized"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_store_killed_at_any_moment_ends_bitwise_as_one_that_was_not(
    folder, whole, tmp_path, monkeypatch, moment, source
):
    recipe = RECIPES["plain"] if source == "quantized" else None
    owner, attribute, before = MOMENTS[moment]
    real, calls = getattr(owner, attribute), []

    def sometimes(*args, **options):
        calls.append(attribute)
        if len(calls) > before:
            raise Killed
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, attribute, sometimes)
        with pytest.raises(Killed):
            collect(folder, tmp_path / "store", recipe=recipe)
    collect(folder, tmp_path / "store", recipe=recipe, resume=True)
    assert contents(tmp_path / "store") == contents(whole[source])


def test_finished_blocks_are_not_observed_again(folder, tmp_path, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "keep_hidden", killed)
        with pytest.raises(Killed):
            collect(folder, tmp_path / "store")
    kept: list[int] = []
    real = StoreWriter.keep

    def watched(writer, block, hessians, **how):
        kept.append(block)
        real(writer, block, hessians, **how)

    monkeypatch.setattr(StoreWriter, "keep", watched)
    collect(folder, tmp_path / "store", resume=True)
    assert kept == [1]
    monkeypatch.delattr(hessian_files, "read_tensors")
    collect(folder, tmp_path / "store", resume=True)  # complete: nothing is left to do or to read
    assert kept == [1]


def test_hidden_states_are_read_once_when_a_store_is_completed(folder, tmp_path, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "close", killed)
        with pytest.raises(Killed):
            collect(folder, tmp_path / "store")
    read: list[str] = []
    real = resume.read_sealed
    monkeypatch.setattr(resume, "read_sealed", lambda path: read.append(path.name) or real(path))
    collect(folder, tmp_path / "store", resume=True)
    assert read == ["hidden.safetensors"]


@pytest.mark.parametrize("source", ["original", "quantized"])
def test_a_damaged_file_is_made_again_by_resume(folder, whole, tmp_path, source):
    recipe = RECIPES["plain"] if source == "quantized" else None
    shutil.copytree(whole[source], tmp_path / "store")
    next((tmp_path / "store").glob("*.1.*fc1.safetensors")).write_bytes(b"half of it")
    collect(folder, tmp_path / "store", recipe=recipe, resume=True)
    assert contents(tmp_path / "store") == contents(whole[source])


def test_hessians_lost_behind_the_ledger_make_it_start_over(folder, whole, tmp_path, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "close", killed)
        patched.setattr(Ledger, "forget_hidden", lambda _: None)
        with pytest.raises(Killed):
            collect(folder, tmp_path / "store", recipe=RECIPES["plain"])
    next((tmp_path / "store").glob("*.0.*fc2.safetensors")).unlink()
    collect(folder, tmp_path / "store", recipe=RECIPES["plain"], resume=True)
    assert contents(tmp_path / "store") == contents(whole["quantized"])


def test_resuming_another_collection_names_every_difference(folder, whole):
    with pytest.raises(UsageError, match=r"recipe was None.*seed was 0, is now 1"):
        collect(folder, whole["original"], recipe=RECIPES["plain"], seed=1, resume=True)


def test_a_folder_that_holds_files_is_refused_unless_overwritten(folder, whole, tmp_path):
    shutil.copytree(whole["original"], tmp_path / "store")
    with pytest.raises(UsageError, match=r"--save .*--resume.*--overwrite"):
        collect(folder, tmp_path / "store")
    collect(folder, tmp_path / "store", "llama", overwrite=True)
    HessianStore(tmp_path / "store").check(places(load_model(str(folder / "llama")).model))


def test_a_quantized_model_has_no_store(folder, tmp_path):
    run_experiment(experiment(folder, "opt", RECIPES["plain"], save=tmp_path / "saved"))
    write_text(tmp_path / "text.txt")
    with pytest.raises(UnsupportedModel, match="quantized already"):
        collect(tmp_path, tmp_path / "store", "saved")
    assert not (tmp_path / "store").exists()


def test_each_input_is_read_once_and_nothing_runs_through_the_model(folder, tmp_path, monkeypatch):
    collect(folder, tmp_path, "llama")
    read: list[str] = []
    real = HessianStore.read

    def watched(store, name):
        read.append(name)
        return real(store, name)

    monkeypatch.setattr(HessianStore, "read", watched)
    store, model = HessianStore(tmp_path), load_model(str(folder / "llama")).model
    monkeypatch.setattr(type(model), "forward", None)
    watch = from_store(model, tmp_path, RECIPES["E8P12"])
    assert read == [one.name for one in store.inputs]
    assert list(watch.seconds) == ["read", "quantize"]


def test_a_run_from_a_store_that_was_killed_is_taken_up_and_another_store_is_not(
    folder, whole, tmp_path, monkeypatch
):
    how = RECIPES["ldlq"]
    shutil.copytree(whole["original"], tmp_path / "store")
    asked = {"hessians": tmp_path / "store", "out": tmp_path / "run", "resume": True}
    run_experiment(experiment(folder, "opt", how, hessians=tmp_path / "store", save=tmp_path / "a"))
    real, kept = Ledger.keep, []

    def sometimes(ledger, block, *rest):
        if len(kept) == 1:
            raise Killed
        kept.append(block.index)
        real(ledger, block, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "keep", sometimes)
        with pytest.raises(Killed):
            run_experiment(experiment(folder, "opt", how, **asked))
    report = run_experiment(experiment(folder, "opt", how, save=tmp_path / "b", **asked))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert report["calibration"] == HessianStore(tmp_path / "store").stamp
    assert report["fingerprint"]["hessians"] == HessianStore(tmp_path / "store").digest
    collect(folder, tmp_path / "store", seed=1, overwrite=True)
    with pytest.raises(UsageError, match="hessians was"):
        run_experiment(experiment(folder, "opt", how, **asked))


def test_a_store_of_other_weights_is_warned_of(folder, whole, tmp_path, caplog):
    tuned = load_model(str(folder / "opt"))
    tuned.model.get_parameter("model.decoder.layers.0.fc1.bias").fill_(0.5)
    for part in (tuned.model, tuned.tokenizer):
        part.save_pretrained(tmp_path / "tuned")
    run_experiment(experiment(tmp_path, "tuned", RECIPES["plain"], hessians=whole["original"]))
    assert "is not quite of this model (weights was" in caplog.text
