"""Fine-tuning of trellis codes: scales move, and tables that matrices have for themselves."""

import pytest
import torch

from quip.codebooks import Groups, Trellis, Trellises
from quip.errors import QuipError
from quip.model.tune import ModelTuning, tune_model
from quip.packed.checkpoint import load
from tests.support.checkpoints import quantized as loadable
from tests.support.checkpoints import save
from tests.support.tuning import DRAWN, changed, short, state

WINDOWS = DRAWN[:16]
ONLY = ModelTuning(epochs=1, lr=0.0, signs_lr=0.0)
OWN = {
    "codebook": "trellis",
    "wbits": 2,
    "trellis_code": "mul1",
    "trellis_states": 6,
    "own_table": True,
    "npasses": 0,
}
BOOKS = {
    "columns": Trellis(code="mul1", bits=2, states=6),
    "tiles": Trellis(code="1mad", bits=2, states=6, rows=8, columns=4),
    "pairs": Trellis(code="mul1", bits=1.5, states=16, rows=8, columns=2),
    "own": Trellis(code="mul1", bits=2, states=6, own=True),
    "own, pairs": Trellis(code="mcg", bits=1.5, states=6, rows=8, columns=2, own=True),
}


def drawn(book: Trellis, rng: torch.Generator, *, group: int | None = 8):
    """Random codes of 32 x 48 weights, and what decodes them."""
    groups = Groups(48 // book.columns, group and group // book.columns)
    X = torch.randn(groups.count, 32, group or 48, generator=rng)
    decoder = book.joined([book.fit(x, torch.ones(x.shape[1])) for x in X], groups)
    steps = torch.randint(2**decoder.index_bits, (32, 48 // decoder.dim), generator=rng)
    return decoder, steps.to(torch.uint8)


@pytest.mark.parametrize("group", [8, None])
@pytest.mark.parametrize("name", BOOKS)
def test_a_decoder_decodes_what_it_learns_and_keeps_it_rounded(rng, name, group):
    decoder, codes = drawn(BOOKS[name], rng, group=group)
    values = decoder.learnable()
    assert [*values] == ["scale", "table"][: 2 if BOOKS[name].own else 1]
    states = decoder.prepared(codes)
    assert torch.equal(decoder.decode_with(states, values), decoder.decode(codes))
    moved = {k: x * (1 + 0.1 * torch.rand(x.shape, generator=rng)) for k, x in values.items()}
    learned = decoder.learned(moved)
    assert torch.equal(learned.scale, moved["scale"].bfloat16().float())
    assert not BOOKS[name].own or torch.equal(learned.table, moved["table"].half())
    W_t = decoder.decode_with(states, learned.learnable())
    assert torch.equal(learned.decode(codes), W_t)
    assert (W_t - decoder.decode_with(states, moved)).norm() < 0.01 * W_t.norm()


@pytest.mark.parametrize("name", BOOKS)
def test_gradients_of_scales_and_tables_are_sums_over_their_weights(rng, name):
    decoder, codes = drawn(BOOKS[name], rng)
    states, weigh = decoder.prepared(codes), torch.randn(32, 48, generator=rng)
    values = {k: x.clone().requires_grad_() for k, x in decoder.learnable().items()}
    (decoder.decode_with(states, values) * weigh).sum().backward()
    for moves, x in values.items():  # W~ is linear in each of the two
        direction = torch.randn(x.shape, generator=rng)
        expected = (decoder.decode_with(states, {**values, moves: direction}) * weigh).sum()
        torch.testing.assert_close((x.grad * direction).sum(), expected, rtol=1e-4, atol=1e-4)


def test_a_scale_that_tuning_would_lose_stays_positive(rng):
    decoder, _ = drawn(BOOKS["columns"], rng)
    assert bool((decoder.learned({"scale": -decoder.scale}).scale > 0).all())


def test_a_table_of_its_own_is_stored_and_comes_back(rng):
    decoder, codes = drawn(BOOKS["own, pairs"], rng)
    stored, options = decoder.tensors(), decoder.options()
    assert stored["table"].shape == (2**6, 2)
    again = Trellises.restore(stored, 32, 48, **options)
    assert torch.equal(again.decode(codes), decoder.decode(codes))
    stored["table"][5, 1] = torch.inf
    with pytest.raises(QuipError, match="a number of its table is not finite"):
        Trellises.restore(stored, 32, 48, **options)


def test_they_move_codes_stay_the_divergence_falls_and_all_comes_back_bitwise(tmp_path):
    student = loadable("llama", OWN, blocks=2)
    before = state(student)
    record = tune_model(student, short(), WINDOWS, ONLY, device="cpu", seed=0)
    assert record.improved
    assert {name.rpartition(".")[2] for name in changed(student, before)} == {"scale", "table"}
    again = load(save(student, tmp_path / "tuned"))
    assert changed(again, state(student)) == set()
