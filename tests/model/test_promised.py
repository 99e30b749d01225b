"""After a quantization every matrix that was to be quantized is, or an error names it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from quip.data.hessians import HessianStore
from quip.errors import QuipError, Unavailable, UsageError
from quip.matrix.build import build_recipe
from quip.model import deal
from quip.model.block_module import BlockModule
from quip.model.ledger import Ledger
from quip.model.matrices import coverage, places
from quip.model.quantize import quantize_from_store, quantize_matrix_by_matrix
from quip.model.run import Run
from tests.support.hessians import observed, written
from tests.support.tiny import tiny, tokens

RUN = Run(recipe=build_recipe(quant="nearest", wbits=4), seed=0, device="cpu")
LEFT_OUT = "model.layers.0.self_attn.o_proj"


def by_tokens(model: nn.Module, folder: Path, run: Run) -> list:
    return list(quantize_matrix_by_matrix(model, tokens(), run))


def by_store(model: nn.Module, folder: Path, run: Run) -> list:
    written(folder, observed("llama"))
    return list(quantize_from_store(model, HessianStore(folder), run))


@pytest.mark.parametrize("quantize_all", [by_tokens, by_store])
def test_all_that_coverage_promises_is_quantized(quantize_all: Callable, tmp_path: Path):
    model = tiny("llama")
    promised = coverage(model).quantized
    assert sorted(record.name for record in quantize_all(model, tmp_path, RUN)) == sorted(promised)
    assert coverage(model).quantized == ()


@pytest.mark.parametrize("quantize_all", [by_tokens, by_store])
def test_a_matrix_that_is_left_out_is_named(quantize_all: Callable, tmp_path: Path, monkeypatch):
    real = deal.quantize_siblings

    def forgetful(block, names, *rest, **more):
        return real(block, [name for name in names if name != LEFT_OUT], *rest, **more)

    monkeypatch.setattr(deal, "quantize_siblings", forgetful)
    with pytest.raises(QuipError, match=rf"^model.layers.0: 1 of its .* \({LEFT_OUT}\); please"):
        quantize_all(tiny("llama"), tmp_path, RUN)


@pytest.mark.parametrize("quantize_all", [by_tokens, by_store])
def test_a_matrix_that_was_not_replaced_is_named(
    quantize_all: Callable, tmp_path: Path, monkeypatch
):
    real = BlockModule.replace

    def forgetful(self, name, module):
        if name != LEFT_OUT:
            real(self, name, module)

    monkeypatch.setattr(BlockModule, "replace", forgetful)
    with pytest.raises(QuipError, match=rf"^LlamaForCausalLM: 1 of .* \({LEFT_OUT}\); please"):
        quantize_all(tiny("llama"), tmp_path, RUN)


def test_a_matrix_that_a_finished_block_lacks_is_named(tmp_path: Path, monkeypatch):
    ledger = Ledger(tmp_path, {})
    ledger.open()
    run = Run(recipe=RUN.recipe, seed=0, device="cpu", ledger=ledger)
    by_tokens(tiny("llama"), tmp_path, run)
    real = Ledger.restore

    def forgetful(self, block, model):
        records, tuned = real(self, block, model)
        return [record for record in records if record.name != LEFT_OUT], tuned

    monkeypatch.setattr(Ledger, "restore", forgetful)
    with pytest.raises(QuipError, match=rf"\({LEFT_OUT}\); start over with --overwrite$"):
        by_tokens(tiny("llama"), tmp_path, run)


@pytest.mark.parametrize("order", [[0, 4, 1, 5], [-1, 0]])
def test_inputs_in_any_order_of_blocks_are_all_read(order: list[int], tmp_path: Path):
    written(tmp_path, observed("llama"))
    words = json.loads((tmp_path / "manifest.json").read_text())
    first = [words["inputs"][i] for i in order]
    words["inputs"] = [*first, *(row for row in words["inputs"] if row not in first)]
    (tmp_path / "manifest.json").write_text(json.dumps(words))
    model = tiny("llama")
    found = list(quantize_from_store(model, HessianStore(tmp_path), RUN))
    assert len(found) == len(places(tiny("llama")))


@pytest.mark.parametrize("block", [99, -1, 1])
def test_a_store_whose_blocks_are_not_the_models_is_refused_before_any_work(
    block: int, tmp_path: Path, monkeypatch
):
    written(tmp_path, observed("llama"))
    words = json.loads((tmp_path / "manifest.json").read_text())
    words["inputs"][1]["block"] = block
    (tmp_path / "manifest.json").write_text(json.dumps(words))
    monkeypatch.delattr(deal, "quantize_siblings")
    says = rf"{LEFT_OUT} has 32 inputs, block 0, and .* block {block};|block is -1, not from 0"
    with pytest.raises((UsageError, Unavailable), match=says):
        list(quantize_from_store(tiny("llama"), HessianStore(tmp_path), RUN))
