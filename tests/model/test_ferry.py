"""Blocks travel while others are worked on, and arrive whole whatever happens on the way."""

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from quip.errors import UsageError
from quip.matrix.build import build_recipe
from quip.model import ferry
from quip.model.ferry import Ferry, visits
from quip.model.moments import Moments
from quip.model.siblings import quantize_siblings
from quip.model.walk import walk
from tests.support.tiny import tiny, tokens

CPU = torch.device("cpu")
RECIPE = build_recipe(quant="ldlq", wbits=2, incoh_processing=True)


def blocks(count: int = 4) -> list[nn.Module]:
    """Each with its number in all weights, and with a buffer."""
    found = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval() for _ in range(count)]
    for number, block in enumerate(found):
        for x in (*block.parameters(), *block.buffers()):
            x.data.fill_(number)
    return found


def numbers(block: nn.Module) -> set[float]:
    return {y for x in (*block.parameters(), *block.buffers()) for y in x.flatten().tolist()}


def crossing(modules: list[nn.Module]):
    """Blocks carried by copies and a thread, as to a CUDA device but from the CPU to itself."""
    return Ferry(CPU, CPU).visits(modules)


def test_each_block_that_lands_is_a_copy_of_itself():
    modules = blocks()
    before = [{id(x): x.data_ptr() for x in module.parameters()} for module in modules]
    for number, block in enumerate(crossing(modules)):
        assert block is modules[number]
        assert numbers(block) == {float(number)}
        if number:  # the first one was not brought beforehand
            assert all(x.data_ptr() != before[number][id(x)] for x in block.parameters())
    assert [numbers(module) for module in modules] == [{0.0}, {1.0}, {2.0}, {3.0}]


def test_the_next_block_is_brought_while_the_present_one_is_worked_on(monkeypatch):
    fetched, fetch, seen = {}, Ferry._fetch, []

    def watched(self, block):
        found = fetch(self, block)
        seen.append(threading.current_thread())
        fetched.setdefault(id(block), threading.Event()).set()
        return found

    monkeypatch.setattr(Ferry, "_fetch", watched)
    modules = blocks()
    for number, _ in enumerate(crossing(modules)):
        for following in modules[number + 1 : number + 2]:
            assert fetched.setdefault(id(following), threading.Event()).wait(10)
    assert len(seen) == 3
    assert threading.main_thread() not in seen


def test_what_changed_since_it_was_fetched_is_brought_again(monkeypatch):
    modules, ready = blocks(), threading.Event()
    fetch = Ferry._fetch
    monkeypatch.setattr(Ferry, "_fetch", lambda self, x: (fetch(self, x), ready.set())[0])
    found = crossing(modules)
    next(found)
    assert ready.wait(10)
    with torch.no_grad():
        modules[1][0].weight.fill_(7)
        modules[1][0].bias = nn.Parameter(torch.full((2,), 8.0))
    assert numbers(next(found)) == {1.0, 7.0, 8.0}


def test_what_changes_while_it_is_fetched_is_brought_again(monkeypatch):
    def staged(x):
        before = x.clone()
        x.fill_(9)
        return before

    monkeypatch.setattr(ferry, "_staged", staged)
    found = crossing(blocks(2))
    next(found)
    assert numbers(next(found)) == {9.0}


def test_a_block_that_does_not_fit_beside_the_present_one_comes_in_its_turn(monkeypatch):
    monkeypatch.setattr(ferry, "free_bytes", lambda _: 0)
    modules = blocks()
    assert [numbers(block) for block in crossing(modules)] == [{0.0}, {1.0}, {2.0}, {3.0}]


def test_a_block_for_which_there_is_no_room_at_all_is_refused_in_one_line(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")

    module = blocks(1)[0]
    home = []
    module.to = home.append
    monkeypatch.setattr(module, "_apply", full)
    with pytest.raises(UsageError, match=r"cpu: CUDA out of memory\. Tried .*; free the device"):
        next(crossing([module]))
    assert home == [CPU]  # whatever of it had landed


def test_all_have_arrived_when_a_walk_is_left_early_or_fails():
    modules, home = blocks(), []
    for module in modules:
        module.to = lambda place, module=module: home.append((module, place))
    found = crossing(modules)
    next(found)
    next(found)
    found.close()
    assert len(home) == 2
    assert set(home) == {(modules[0], CPU), (modules[1], CPU)}  # each by its own thread

    def fail(_):
        raise ZeroDivisionError

    modules[0].to = fail
    with pytest.raises(ZeroDivisionError):
        list(crossing(modules[:1]))


def test_on_the_cpu_nothing_is_copied():
    modules = blocks()
    before = [x.data_ptr() for module in modules for x in module.parameters()]
    list(visits(modules, CPU, home=CPU))
    assert [x.data_ptr() for module in modules for x in module.parameters()] == before


def test_tensors_of_inference_mode_travel_too():
    with torch.inference_mode():
        modules = blocks()
    with torch.inference_mode():
        assert [numbers(block) for block in crossing(modules)] == [{0.0}, {1.0}, {2.0}, {3.0}]


class Stream:
    """Says what is asked of it, in one list for all; its events are called after it."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said, self.events = name, said, 0

    def record_event(self) -> str:
        self.events += 1
        self.said.append(f"{self.name} marks {self.name}{self.events}")
        return f"{self.name}{self.events}"

    def wait_event(self, event: str) -> None:
        self.said.append(f"{self.name} waits for {event}")


def test_each_stream_waits_for_the_other_before_it_touches_what_that_one_wrote(monkeypatch):
    said: list[str] = []
    walk_stream, aside = Stream("walk", said), Stream("aside", said)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: walk_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda _, x: said.append(f"{x.name} uses it")
    )
    modules = [nn.Linear(2, 2, bias=False) for _ in range(3)]
    for number, module in enumerate(modules):
        module.to = lambda _, number=number: said.append(f"{number} goes home")
    carrier = Ferry(CPU, CPU)
    carrier._stream = aside
    for number, _ in enumerate(carrier.visits(modules)):
        said.append(f"work on {number}")
    for number in range(3):
        steps = [f"work on {number}", f"walk marks walk{number + 1}"]
        steps += [f"aside waits for walk{number + 1}", f"{number} goes home"]
        assert sorted(steps, key=said.index) == steps
    for number in (1, 2):
        steps = [f"aside marks aside{number}", f"walk waits for aside{number}", f"work on {number}"]
        assert sorted(steps, key=said.index) == steps
    assert said.count("walk uses it") == 2  # those of blocks that were fetched


def walked(model: nn.Module, device: str) -> dict[str, torch.Tensor]:
    """The state of the model once its first blocks were quantized on a device."""
    ids = tokens()
    for block in walk(model, ids, device=device, batch_size=4):
        hessians = block.observe()
        for name in list(block.matrices())[:1]:
            moments = Moments(H=hessians[name].value(), count=1)
            list(quantize_siblings(block, [name], moments, {name: RECIPE}, 0))
    return model.state_dict()


def test_a_walk_by_the_ferry_leaves_what_a_walk_without_it_does(monkeypatch):
    expected = walked(tiny("llama"), "cpu")
    monkeypatch.setattr(
        "quip.model.walk.visits",
        lambda modules, device, home, stream: Ferry(device, home).visits(modules),
    )
    found = walked(tiny("llama"), "cpu")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_on_a_device_are_whole_there_and_at_home():
    modules = [nn.Linear(500, 400) for _ in range(6)]
    expected = [module.weight.detach().clone() for module in modules]
    for number, block in enumerate(visits(modules, torch.device("cuda"), home=CPU)):
        assert block.weight.device.type == "cuda"
        with torch.no_grad():
            busy = torch.ones(3000, 3000, device="cuda")
            for _ in range(20):  # so that the way home has something to wait for
                busy = busy @ busy / 3000
            block.weight.add_(busy[0, 0])
        assert {x.weight.device.type for x in modules[number + 1 :]} <= {"cpu"}
    for module, before in zip(modules, expected, strict=True):
        assert module.weight.device == CPU
        torch.testing.assert_close(module.weight.detach(), before + 1)
