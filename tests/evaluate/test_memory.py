"""Peaks are those of the stretch that was measured, and shared bytes are counted once."""

import mmap
import resource
import sys

import pytest
import torch
from torch import nn

from quip.errors import UsageError
from quip.evaluate import memory
from quip.evaluate.memory import measured, module_bytes
from tests.support.tiny import tiny

BYTES = 80_000_000
SLACK = 8_000_000  # what else the process may do meanwhile

resettable = pytest.mark.skipif(
    not memory.CLEAR_REFS.exists(), reason="the system's mark cannot be reset here"
)


def spend() -> None:
    # Not torch.ones: the allocator may have as much left over from tests before.
    with mmap.mmap(-1, BYTES) as pages:
        pages[::4096] = bytes(len(range(0, BYTES, 4096)))


@resettable
def test_the_peak_of_memory_that_was_freed_again_is_found():
    with measured("cpu") as found:
        assert found.peak_bytes == found.start_bytes > 0
        spend()
    assert not found.since_process_start
    assert found.peak_bytes - found.start_bytes == pytest.approx(BYTES, abs=SLACK)


@resettable
def test_what_was_spent_before_or_after_does_not_count():
    spend()
    with measured("cpu") as found:
        pass
    spend()
    assert 0 <= found.peak_bytes - found.start_bytes < SLACK


@resettable
def test_the_peak_is_known_after_an_error_too():
    seen = []

    def fail() -> None:
        with measured("cpu") as found:
            seen.append(found)
            spend()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen[0].peak_bytes - seen[0].start_bytes == pytest.approx(BYTES, abs=SLACK)


def forbid(monkeypatch, tmp_path, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(memory, name, tmp_path / "missing" / name)


@pytest.mark.parametrize("names", [("CLEAR_REFS",), ("CLEAR_REFS", "STATUS")])
def test_a_mark_that_cannot_be_reset_is_said_to_be_of_the_process(monkeypatch, tmp_path, names):
    spend()
    forbid(monkeypatch, tmp_path, *names)
    with measured("cpu") as found:
        pass
    assert found.since_process_start
    unit = 1 if sys.platform == "darwin" else 1024
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert found.peak_bytes == pytest.approx(highest, abs=SLACK)
    assert found.start_bytes <= found.peak_bytes


def test_memory_of_another_kind_of_device_is_refused():
    with pytest.raises(UsageError, match="cpu and cuda, not on meta"), measured("meta"):
        pass


def test_module_bytes_are_those_of_parameters_and_buffers():
    module = nn.BatchNorm1d(6)  # weight and bias; running mean, variance, and an int64
    assert module_bytes(module) == 4 * 6 * 4 + 8
    assert module_bytes(module.to(torch.float16)) == 4 * 6 * 2 + 8


def test_tied_weights_are_counted_once():
    model = tiny("opt")  # lm_head is the embedding
    parameters = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert module_bytes(model) == sum(parameters.values())


def test_views_of_one_storage_are_counted_once_and_whole():
    module, whole = nn.Module(), torch.zeros(10, 4)
    module.a, module.b = nn.Parameter(whole[:3]), nn.Parameter(whole[5:])
    module.register_buffer("c", whole.T)
    assert module_bytes(module) == 160


def test_bytes_of_modules_without_memory_are_counted_too():
    assert module_bytes(nn.Linear(3, 5, device="meta")) == (15 + 5) * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_on_a_device_is_that_of_its_tensors():
    kept = torch.ones(BYTES, dtype=torch.uint8, device="cuda")
    torch.ones(2 * BYTES, dtype=torch.uint8, device="cuda")
    with measured("cuda") as found:
        torch.ones(BYTES, dtype=torch.uint8, device="cuda")
    assert found.start_bytes >= kept.nbytes
    assert found.peak_bytes - found.start_bytes == pytest.approx(BYTES, rel=0.01)
