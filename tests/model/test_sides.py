"""What the loss feels of a block's outputs: H_O and held-out gradients, as autograd has them."""

import pytest
import torch
from torch import nn

from quip.model.sensitivity.crossings import crossings
from quip.model.sensitivity.measure import Passing
from quip.model.sides import Side, Sides
from quip.model.walk import blocks_at_rest
from tests.support.tiny import tiny, tokens

HELD = 3  # of seven windows


def sides(model: nn.Module, batch_size: int = 2) -> dict[str, Side]:
    """The side of each matrix alone, of all blocks."""
    how = Passing(kind="labels", seed=0, device=torch.device("cpu"), batch_size=batch_size)
    found, kept = {}, Sides(crossings(model, tokens(), how), held=HELD)
    for block in blocks_at_rest(model, device="cpu"):
        found |= kept.of(block, [[name] for name in block.matrices()])
    return found


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_sides_are_of_the_gradients_of_each_window(name):
    model = tiny(name)
    found, ids = sides(model), tokens()
    model = tiny(name, dtype=torch.float64)
    for matrix, side in found.items():
        W = model.get_submodule(matrix).weight
        G = torch.stack([gradient(model, W, window) for window in ids])
        torch.testing.assert_close(side.held.double(), G[-HELD:], rtol=1e-3, atol=1e-5)
        expected = (G[:-HELD] @ G[:-HELD].mT).mean(0) / W.shape[1]
        torch.testing.assert_close(side.H_O, expected, rtol=1e-3, atol=1e-5)
        E = torch.randn(W.shape, generator=torch.Generator().manual_seed(1), dtype=W.dtype)
        damage = (G[-HELD:] * E).sum((1, 2)).square().mean() / 2
        assert float(side.damage(E)) == pytest.approx(float(damage), rel=1e-2)


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
    held, scales = torch.randn(2, 6, 4, generator=rng), torch.rand(6, generator=rng) + 0.5
    side, E = Side(H_O=torch.eye(6).double(), held=held), torch.randn(6, 4, generator=rng)
    assert float(side.of(slice(2, 5)).damage(E[2:5])) == pytest.approx(
        float(side.damage(torch.cat([E[:2] * 0, E[2:5], E[5:] * 0]))), rel=1e-5
    )
    assert float(side.scaled(scales).damage(E / scales[:, None])) == pytest.approx(
        float(side.damage(E)), rel=1e-5
    )
    torch.testing.assert_close(side.scaled(scales).H_O.diagonal(), scales.double() ** 2)
