"""What a change of basis does to activations in one pass is what its links do one after another."""

import pytest
import torch

from quip.transforms import Chain, HadamardDraw, KroneckerDraw, RescaleDraw
from quip.transforms.vectors import Vectors
from tests.laws import assert_near

CHAINS = {
    "none": (),
    "rescaled": (RescaleDraw(),),
    "hadamard": (HadamardDraw(None),),
    "blocks": (RescaleDraw(), HadamardDraw(8)),
    "kronecker": (RescaleDraw(), KroneckerDraw()),
    "kronecker alone": (KroneckerDraw(permute=False),),
    "factors in blocks": (KroneckerDraw(blocked=True),),
    "two": (HadamardDraw(None), HadamardDraw(None)),
}
SEVERAL = ("none", "rescaled", "two")


def drawn(name: str, rng: torch.Generator) -> Chain:
    W, A = (torch.randn(size, generator=rng) for size in ((16, 24), (24, 24)))
    chain, _, _ = Chain.draw(CHAINS[name], W, A @ A.T, rng)
    return chain


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_vectors_come_out_as_the_links_make_them(name, dtype, scaled, rng):
    chain, scales = drawn(name, rng), torch.rand(16, generator=rng) + 0.5 if scaled else None
    vectors, wide = Vectors.of(chain, scales), torch.promote_types(dtype, torch.float32)
    x, y = (torch.randn(3, size, generator=rng).to(dtype) for size in (24, 16))
    noise = 1e-6 if wide == torch.float32 else 1e-14
    entered, expected = vectors.input(x), chain.input(x.to(wide))
    assert entered.dtype == wide
    assert_near(entered, expected, noise)
    left = chain.output(y.to(wide)) * (1 if scales is None else scales)
    assert_near(vectors.output(y.to(wide), wide), left, noise)
    assert vectors.output(y.to(wide), dtype).dtype == dtype


def test_factors_are_part_of_the_one_pass(rng):
    scales = torch.rand(16, generator=rng) + 0.5
    for name in CHAINS:
        found = Vectors.of(drawn(name, rng), scales).turn
        assert (found is None) == (name in SEVERAL)


def test_gradients_pass(rng):
    vectors = Vectors.of(drawn("blocks", rng), torch.rand(16, generator=rng) + 0.5)
    x = torch.randn(2, 24, generator=rng).requires_grad_()
    y = vectors.input(x)[:, :16].contiguous()
    vectors.output(y, torch.bfloat16).float().square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)
