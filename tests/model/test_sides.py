"""What the loss feels of a block's outputs: H_O and held-out gradients, as autograd has them."""

import pytest
import torch
from torch import nn

from quip.errors import UsageError
from quip.matrix.build import build_recipe
from quip.model.quantize import quantize_matrix_by_matrix
from quip.model.run import Run
from quip.model.sensitivity.crossings import crossings
from quip.model.sensitivity.measure import Passing
from quip.model.sides import Side, Sides, check_two_sided
from quip.model.walk import blocks_at_rest
from tests.support.tiny import tiny, tokens

HELD = 3  # of seven windows


def sides(model: nn.Module, batch_size: int = 2) -> dict[str, Side]:
    """The side of each matrix alone, of all blocks."""
    how = Passing(kind="labels", seed=0, device=torch.device("cpu"), batch_size=batch_size)
    found, kept = {}, Sides(crossings(model, tokens(), how), held=HELD)
    for block in blocks_at_rest(model, device="cpu"):
        found |= {name: side.of([name]) for name, side in kept.of(block).items()}
    return found


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_sides_are_of_the_gradients_of_each_window(name):
    model = tiny(name)
    found, ids = sides(model), tokens()
    model = tiny(name, dtype=torch.float64)
    for matrix, side in found.items():
        W = model.get_submodule(matrix).weight
        G = torch.stack([gradient(model, W, window) for window in ids])
        expected = (G[:-HELD] @ G[:-HELD].mT).mean(0) / W.shape[1]
        torch.testing.assert_close(side.H_O, expected, rtol=1e-3, atol=1e-5)
        tokens_of = side.g.view(HELD, -1, len(W)).double(), side.x.view(HELD, -1, W.shape[1])
        felt = tokens_of[0].mT @ tokens_of[1].double()  # G again, of the tokens that are kept
        torch.testing.assert_close(felt, G[-HELD:], rtol=1e-3, atol=1e-5)
        E = torch.randn(W.shape, generator=torch.Generator().manual_seed(1), dtype=W.dtype)
        each = [
            float(g @ E @ x) ** 2 for g, x in zip(side.g.double(), side.x.double(), strict=True)
        ]
        assert float(side.damage(E)) == pytest.approx(sum(each) / len(each) / 2, rel=1e-4)


def gradient(model: nn.Module, W: nn.Parameter, ids: torch.Tensor) -> torch.Tensor:
    """That of the sum of cross entropies of a window for the labels of the data."""
    logits = model(input_ids=ids[None]).logits[0]
    loss = nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    return torch.autograd.grad(loss, W)[0]


def test_how_many_windows_pass_together_does_not_matter():
    one, other = sides(tiny("llama"), 1), sides(tiny("llama"), 4)
    for matrix, side in one.items():
        torch.testing.assert_close(side.H_O, other[matrix].H_O, rtol=1e-4, atol=1e-8)


def test_rows_and_scales_of_a_side():
    rng = torch.Generator().manual_seed(0)
    x, g = torch.randn(9, 4, generator=rng), torch.randn(9, 6, generator=rng)
    scales = torch.rand(6, generator=rng) + 0.5
    E, H_O = torch.randn(6, 4, generator=rng), torch.diag(torch.arange(6).double())
    rows = {"a": slice(0, 2), "b": slice(2, 5), "c": slice(5, 6)}
    side = Side(rows=rows, H_O=H_O, x=x, g=g)
    part = side.of(["c", "a"])
    assert part.rows == {"c": slice(0, 1), "a": slice(1, 3)}
    assert part.H_O.diagonal().tolist() == [5, 0, 1]
    some = torch.cat([E[:2], 0 * E[2:5], E[5:]])
    assert float(part.damage(E[[5, 0, 1]])) == pytest.approx(float(side.damage(some)), rel=1e-5)
    assert float(side.scaled(scales).damage(E / scales[:, None])) == pytest.approx(
        float(side.damage(E)), rel=1e-5
    )
    expected = torch.arange(6) * scales.double() ** 2
    torch.testing.assert_close(side.scaled(scales).H_O.diagonal(), expected)


@pytest.mark.parametrize("flags", [{"wbits": 2, "incoh_processing": True}, {"codebook": "E8P12"}])
def test_a_matrix_is_rounded_on_two_sides_only_where_windows_held_out_lose_less(flags):
    ids = tokens()
    found = {}
    for two_sided in (False, True):
        model = tiny("llama")
        how = Passing(kind="fisher", seed=0, device=torch.device("cpu"), batch_size=2)
        run = Run(
            recipe=build_recipe(**flags),
            seed=0,
            device="cpu",
            batch_size=2,
            sides=Sides.measured(model, ids, how) if two_sided else None,
        )
        found[two_sided] = list(quantize_matrix_by_matrix(model, ids, run))
    assert {record.two_sided for record in found[False]} == {None}
    assert {record.two_sided for record in found[True]} == {False, True}
    for plain, record in zip(found[False][:7], found[True][:7], strict=True):  # of one block
        same = record.proxy_loss == plain.proxy_loss
        assert same == (not record.two_sided)
        assert record.bits_per_weight == plain.bits_per_weight


def test_too_few_windows_are_refused():
    how = Passing(kind="fisher", seed=0, device=torch.device("cpu"))
    with pytest.raises(UsageError, match="3 windows: at least 4"):
        Sides.measured(tiny("llama"), tokens()[:3], how)


def test_learned_codebooks_are_refused():
    with pytest.raises(UsageError, match="vq rounds all rows"):
        check_two_sided(build_recipe(wbits=2, codebook="vq"))
    for codebook in ("int", "trellis"):
        check_two_sided(build_recipe(wbits=2, codebook=codebook))
