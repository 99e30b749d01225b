"""Batches of windows: as large as memory allows, smaller where it runs out, and never wrong."""

import pytest
import torch
from torch import nn

from quip.errors import UsageError
from quip.model import states
from quip.model.states import _windows, batch_size_for
from quip.model.walk import walk
from tests.support.tiny import SEQLEN, tiny, tokens


@pytest.fixture
def most(monkeypatch):
    """most(model, windows, after=calls): its blocks run out of memory with more windows at once."""

    def limit(model: nn.Module, windows: int, *, after: int = 0) -> list[int]:
        seen = []

        def hook(_, args):
            seen.append(len(args[0]))
            if len(args[0]) > windows and len(seen) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

        for block in model.model.layers:  # in the middle of a block: some matrices have run
            block.mlp.down_proj.register_forward_pre_hook(hook)
        return seen

    return limit


def moments(model: nn.Module, batch_size: int) -> list[torch.Tensor]:
    """The hidden states that enter each block, its second moments, and what it puts out."""
    found = []
    for block in walk(model, tokens(8), device="cpu", batch_size=batch_size):
        hessians = block.observe()
        found += [block.hidden.clone(), *(x.value() for x in hessians.values()), block.outputs()]
        assert {x.count for x in hessians.values()} == {8 * SEQLEN}
    return found


@pytest.mark.parametrize("name", ["llama", "mistral"])  # the latter has masks of each batch
# The model runs a window; then come both batches of observe, of outputs and of replay.
@pytest.mark.parametrize("after", [1, 2, 4, 6])
def test_a_batch_that_does_not_fit_is_done_again_in_halves(most, caplog, name, after):
    model, expected = tiny(name), moments(tiny(name), 1)
    seen = most(model, 2, after=after)
    for found, wanted in zip(moments(model, 4), expected, strict=True):
        # Batches of other sizes, in products of float32 and their sums.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert seen.count(4) == after  # once it is known, no batch is as large again
    assert [x.message for x in caplog.records] == [
        "model.layers.0: out of memory on cpu; from here on 2 windows pass together, which may "
        "change numbers in their last digits"
    ]


def test_batches_of_an_odd_size_end_where_those_before_did(most):
    model, expected = tiny("llama"), moments(tiny("llama"), 1)
    seen = most(model, 3, after=5)
    for found, wanted in zip(moments(model, 5), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert set(seen) == {5, 3, 1}


def test_a_window_that_does_not_fit_is_refused_in_one_line(most):
    model = tiny("llama")
    most(model, 0, after=1)
    block = next(walk(model, tokens(), device="cpu", batch_size=4))
    with pytest.raises(UsageError) as raised:
        block.observe()
    assert str(raised.value) == (
        "model.layers.0: cpu has no memory for a window of 12 tokens; give a smaller --seqlen, "
        "free the device, or say --device cpu"
    )


def test_a_device_on_which_not_even_the_first_window_fits_is_refused_in_one_line(most):
    model = tiny("llama")
    most(model, 0)
    with pytest.raises(UsageError, match=r"a window of 12 tokens on cpu: CUDA .*; give a"):
        next(walk(model, tokens(), device="cpu", batch_size=4))


@pytest.mark.parametrize(("seqlen", "windows"), [(1, 4096), (2048, 2), (4096, 1), (9000, 1)])
def test_on_the_cpu_a_batch_has_4096_tokens_whatever_the_model(seqlen, windows):
    assert batch_size_for(seqlen, tiny("opt"), "cpu") == windows


def block(hidden: int, inner: int) -> nn.Module:
    """The matrices of a Llama's block, without memory."""
    shapes = [*4 * [(hidden, hidden)], *2 * [(hidden, inner)], (inner, hidden)]
    return nn.ModuleList(nn.Linear(*shape, device="meta") for shape in shapes)


@pytest.mark.parametrize(
    ("hidden", "inner", "memory", "windows"),
    [
        (4096, 11008, 80e9, 16),
        (4096, 11008, 24e9, 8),
        (8192, 28672, 80e9, 8),
        (8192, 28672, 8e9, 2),  # never less than on a CPU
        (576, 1536, 80e9, 32),
    ],
)
def test_on_a_card_a_batch_is_a_power_of_two_by_its_memory(hidden, inner, memory, windows):
    assert _windows(2048, block(hidden, inner), int(memory)) == windows


def test_hidden_states_that_do_not_fit_on_a_card_lie_in_pinned_memory(monkeypatch):
    entering, asked, refused = torch.ones(2, 3, 5), [], []

    def new_empty(_, shape, **options):
        asked.append((shape, options))
        if "pin_memory" in options and refused:
            raise RuntimeError("CUDA error: out of memory")
        return torch.empty(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    cuda, room = torch.device("cuda"), 4 * 7 * entering[0].nbytes
    place = object.__new__(states.States)
    place.device, place._tokens = cuda, torch.zeros(7, 3)
    place._activations, place.paired = states.IN_MEMORY, False
    for free in (room, room - 1):
        monkeypatch.setattr(states, "free_bytes", lambda _, free=free: free)
        place._room(entering)
    refused.append("more pinned memory")
    assert place._room(entering).shape == (7, 3, 5)
    shape, pinned = (7, 3, 5), {"device": "cpu", "pin_memory": True}
    assert asked == [(shape, {"device": cuda}), (shape, pinned), (shape, pinned)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hidden_states_in_pinned_memory_are_those_on_the_device(monkeypatch):
    def walked() -> list[torch.Tensor]:
        found = []
        for block in walk(tiny("llama", "sdpa"), tokens(8), device="cuda", batch_size=2):
            hessians = block.observe()
            found += [block.hidden.cpu().clone(), block.outputs().cpu()]
            found += [hessian.value().cpu() for hessian in hessians.values()]
        return [*found, block.hidden]

    *expected, on_card = walked()
    monkeypatch.setattr(states, "free_bytes", lambda _: 0)
    *found, pinned = walked()
    assert (on_card.device.type, pinned.device.type, pinned.is_pinned()) == ("cuda", "cpu", True)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
