"""Memory of a device that runs out is a line with a remedy, wherever a model is at work."""

import pytest
import torch

from quip.errors import UsageError
from quip.evaluate.perplexity import perplexity
from quip.matrix.build import build_recipe
from quip.model import deal
from quip.model.device import enough_memory, free_bytes, placed
from quip.model.quantize import quantize_model
from tests.support.tiny import tiny, tokens

SAID = "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of 79.11 GiB."


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(SAID)


def test_what_torch_says_becomes_one_line_with_the_remedy():
    with pytest.raises(UsageError) as raised, enough_memory("the work", "do less"):
        full()
    assert str(raised.value) == f"the work: {' '.join(SAID.split())}; do less"


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), enough_memory("the work", "do less"):
        raise ZeroDivisionError


def test_a_matrix_that_does_not_fit_is_named_by_its_block(monkeypatch):
    monkeypatch.setattr(deal, "quantize_siblings", full)
    with pytest.raises(UsageError, match=r"^model\.layers\.0 on cpu: CUDA .*; free the device, or"):
        quantize_model(tiny("llama"), tokens(), build_recipe(wbits=4), device="cpu", seed=0)


def test_a_model_that_does_not_fit_is_taken_back(monkeypatch):
    model, moves = tiny("opt"), []
    monkeypatch.setattr(model, "to", lambda where: moves.append(str(where)) or model)
    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(UsageError, match=r"^the model on cpu:0: CUDA .*; free the device, or say"):
        perplexity(model, tokens(), device="cpu:0")
    assert moves == ["cpu:0", "cpu"]
    with placed(model, "cpu"):
        pass


def test_only_a_cuda_device_is_ever_full():
    assert free_bytes(torch.device("cpu")) > 2**62
