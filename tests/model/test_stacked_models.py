"""QuIP#: block LDLQ with lattices, after any rotation; its recipes, and what is refused."""

import pickle
from dataclasses import replace

import pytest
import torch

from quip.codebooks import LATTICES, Lattice
from quip.errors import UsageError
from quip.matrix import feedback, recipe
from quip.matrix.build import build_recipe
from quip.matrix.linalg import proxy_loss
from quip.matrix.methods import GPTVQ, METHODS, RECIPES
from quip.matrix.polish import Greedy, greedy
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for
from quip.matrix.sweep import sweep
from quip.model.quantize import quantize_model
from quip.packed.stack import stacks
from quip.transforms import HadamardDraw, KroneckerDraw, RescaleDraw
from tests import reference as ref
from tests.laws import NOISE, assert_near, check_stored
from tests.support.tiny import logits, tiny, tokens

NAMES = pytest.mark.parametrize("codebook", LATTICES)
QUANTS = [name for name in METHODS if name != "ldlbal_admm"]


def quantized(W, H, **flags):
    return quantize_matrix(W, H, build_recipe(**flags), rng=rng_for(0, "w"))


def loss(W, H, **flags) -> float:
    return proxy_loss(W, quantized(W, H, **flags).dequantize(), H)


def fitted(codebook: str, W: torch.Tensor) -> Lattice:
    return Lattice.published(codebook).fit(W, torch.ones(W.shape[1]).to(W))


def decoded(book: Lattice, codes: torch.Tensor) -> torch.Tensor:
    return torch.cat([book.decode(column) for column in codes.T], dim=1)


# Block LDLQ


@NAMES
def test_the_sweep_is_block_ldlq_as_published(codebook):
    W, H = ref.correlated_problem(12, 64)
    book = fitted(codebook, W)
    expected = ref.block_ldlq(W, H, 8, lambda x, _: book.decode(book.round(x, torch.ones(8))))
    codes, _ = sweep(W, *feedback.ldl(H, 8), book)
    assert_near(decoded(book, codes), expected)


@NAMES
def test_the_loss_is_that_of_the_roundings(codebook):
    """tr(E H E^T) = tr(eta D eta^T), where eta is what each rounding left."""
    W, H = ref.correlated_problem(12, 64)
    book, (K, _) = fitted(codebook, W), feedback.ldl(H, 8)
    codes, _ = sweep(W, K, torch.ones(64), book)
    E = W - decoded(book, codes)
    eta = E @ torch.linalg.inv(torch.eye(64).double() - K)
    D = ref.block_ldl(H, 8)[1]
    expected = sum(((e @ d) * e).sum() for e, d in zip(eta.split(8, dim=1), D, strict=True))
    assert_near(((E @ H) * E).sum(), expected, 1e-9)


@NAMES
def test_passes_never_raise_the_loss_and_gain_most_at_once(codebook):
    W, H = ref.correlated_problem(64, 256)
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).double()
    book = fitted(codebook, W)
    codes, books = sweep(W, *feedback.ldl(H, 8), book)
    losses = [proxy_loss(W, decoded(book, codes), H)]
    for _ in range(4):
        codes = greedy(W, H, codes, books, passes=1)
        losses.append(proxy_loss(W, decoded(book, codes), H))
    assert losses == sorted(losses, reverse=True)
    nearest = torch.stack([book.round(x, torch.ones(8)) for x in W.split(8, dim=1)], dim=1)
    assert losses[0] < 0.7 * proxy_loss(W, decoded(book, nearest), H)
    assert losses[0] - losses[1] > losses[1] - losses[4]


def test_passes_alone_would_raise_the_loss_without_the_guard():
    """Nearest in the Euclidean metric is not nearest in that of a block of H."""
    worse = 0
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(200, 32).double() * torch.logspace(0, 2, 32).double()
        mixed = x @ torch.linalg.qr(torch.randn(32, 32).double())[0]
        H, W = mixed.T @ mixed / 200, torch.randn(16, 32).double()
        book = fitted("E8P12", W)
        codes, books = sweep(W, *feedback.ldl(H, 8), book)
        before = proxy_loss(W, decoded(book, codes), H)
        after = codes.clone()
        for k in reversed(range(4)):  # a pass without it
            one = slice(8 * k, 8 * k + 8)
            rest = W - decoded(book, after)
            rest[:, one] = 0
            x_k = W[:, one] + rest @ H[:, one] @ torch.linalg.inv(H[one, one])
            after[:, k] = book.round(x_k, torch.ones(8))
        worse += proxy_loss(W, decoded(book, after), H) > before
        guarded = greedy(W, H, codes, books, passes=3)
        assert proxy_loss(W, decoded(book, guarded), H) <= before * (1 + NOISE)
    assert worse > 0


# Recipes with lattices


@NAMES
@pytest.mark.parametrize("range_", ["tensor", "8", "16"])
@pytest.mark.parametrize("quant", QUANTS)
def test_lattice_recipes_obey_the_laws(problem, quant, range_, codebook):
    W, H = problem(24, 56)
    given = W.clone(), H.clone()
    q = quantized(W.float(), H, quant=quant, codebook=codebook, range_=range_)
    W_hat = q.dequantize()
    assert torch.equal(W, given[0])
    assert torch.equal(H, given[1])
    assert q.codes.shape == (24, 7)
    assert int(q.codes.min()) >= 0
    assert int(q.codes.max()) < 2 ** (8 * LATTICES[codebook].bits)
    assert bool(torch.isfinite(W_hat).all())
    groups = {"tensor": 1, "8": 7, "16": 4}[range_]
    codes = 24 * -(-7 * 8 * LATTICES[codebook].bits // 32) * 32
    assert round(q.bits_per_weight * 24 * 56) == codes + 32 * groups + 16 * (24 + 56)
    decoder = check_stored(q.decoder, 24, 56)
    assert torch.equal(decoder.decode(q.codes), q.decoder.decode(q.codes))
    for saved in (q, pickle.loads(pickle.dumps(q)), replace(q, codes=q.codes.long())):
        assert torch.equal(saved.dequantize(), W_hat)
    half = quantized(W.bfloat16(), H, quant=quant, codebook=codebook, range_=range_)
    single = quantized(W.bfloat16().float(), H, quant=quant, codebook=codebook, range_=range_)
    assert torch.equal(half.codes, single.codes)


@pytest.mark.parametrize("rotation", ["kronecker", "blocked", "hadamard"])
def test_any_rotation_goes_with_any_codebook(problem, rotation):
    W, H = problem(48, 64)
    grid = {"incoh_processing": True, "rotation": rotation}
    two, three, four = (
        loss(W.float(), H, codebook=name, rotation=rotation, pre_rescale=True) for name in LATTICES
    )
    assert two > three > four
    assert two < loss(W.float(), H, wbits=2, **grid)
    assert loss(W.float(), H, wbits=2, **grid) > loss(W.float(), H, wbits=3, **grid)


def test_weights_that_are_zero_and_inputs_that_never_are_lose_nothing(problem):
    W, H = problem(16, 64, dead=(0, 9))
    q = quantized(W.float(), H, codebook="E8P12")
    assert bool(torch.isfinite(q.dequantize()).all())
    for codebook in LATTICES:
        none = quantized(0 * W.float(), H, codebook=codebook).dequantize()
        assert float(none.abs().max()) < 1e-6  # no point of a lattice is 0


def test_auto_keeps_the_scale_with_the_smallest_loss(problem):
    W, H = problem(32, 64)
    auto = build_recipe(codebook="E8P12", scale="auto", range_="tensor")
    losses = [
        loss(W, H, codebook="E8P12", range_="tensor", scale_override=book.rhos[0])
        for book in auto.trials
    ]
    best = proxy_loss(W, quantize_matrix(W, H, auto, rng=rng_for(0, "w")).dequantize(), H)
    # The trials are judged by the damped loss, in the basis of the transform.
    assert best <= min(losses) * 1.02
    assert best < max(losses)


def test_overrides_set_the_scales(problem):
    W, H = problem(32, 64)
    flags = {"codebook": "E8P12RVQ4B", "range_": "tensor"}
    book = build_recipe(**flags, scale_override=0.85, resid_scale_override=3.6).codebook
    assert (book.rhos, book.ratio) == ((0.85,), 3.6)
    q = quantized(W, H, **flags, scale_override=0.85, resid_scale_override=3.6)
    assert q.decoder.ratio == 3.6
    W_t = q.transform.apply(W, H)[0]
    rms = float(W_t.square().mean().sqrt())
    assert float(q.decoder.scale) == pytest.approx(rms / 0.85, rel=2**-8)


def test_faithful_is_the_papers():
    built = build_recipe(codebook="E8P12", faithful=True)
    assert (built.group, built.codebook.rhos, built.polish) == (None, (0.9,), (Greedy(10),))
    built = build_recipe(codebook="E8P12RVQ3B", faithful=True)
    assert (built.codebook.rhos, built.codebook.ratio) == ((0.98,), 2.04)


# Named recipes


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_are_what_their_flags_make(name):
    assert isinstance(build_recipe(**RECIPES[name].flags), recipe.Recipe)


def test_named_recipes_are_the_papers_rows():
    quips = {f"{method}-{bits}bit" for method in ("quip", "quip-sharp") for bits in (2, 3, 4)}
    vectors = {f"gptvq-{dim}d-{bits}" for dim, bits in GPTVQ}
    walks = {"trellis-2bit-fast", *(f"trellis-{bits}bit" for bits in (2, 3, 4))}
    best = {f"best-{bits}bit" for bits in (2, 3, 4)}
    assert set(RECIPES) == quips | vectors | walks | best
    quip, sharp = (build_recipe(**RECIPES[f"{name}-2bit"].flags) for name in ("quip", "quip-sharp"))
    assert quip.transforms == (RescaleDraw(), KroneckerDraw())
    assert sharp.transforms == (HadamardDraw(block=None),)
    assert sharp.codebook.name == "E8P12"
    assert sharp.stack


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"codebook": "D4"}, "--codebook D4: not one of int, E8P12, E8P12RVQ3B, E8P12RVQ4B"),
        ({"codebook": "E8P12", "wbits": 3}, "--wbits 3: E8P12 has 2 bits; leave out --wbits"),
        ({"codebook": "E8P12", "qfn": "b"}, "--qfn b speaks of integer grids: say --codebook int"),
        ({"codebook": "E8P12", "rho": 2.4}, "--rho 2.4 speaks of grid b: say --codebook int"),
        (
            {"codebook": "E8P12", "groupsize": 8},
            "--groupsize 8 speaks of grid a",
        ),
        (
            {"codebook": "E8P12", "unbiased": True, "npasses": 0},
            "--unbiased speaks of integer",
        ),
        ({"codebook": "E8P12", "quant": "ldlbal_admm"}, "--quant ldlbal_admm bounds the feedback"),
        ({"codebook": "E8P12", "range_": "12"}, "--range 12: say tensor, or a multiple of 8"),
        ({"codebook": "E8P12", "range_": "column"}, "--range column: say tensor, or a multiple"),
        ({"codebook": "E8P12", "resid_scale_override": 2.0}, "--codebook E8P12RVQ3B"),
        ({"codebook": "E8P12", "scale_override": 0.0}, "--scale_override 0.0: a positive number"),
        ({"codebook": "E8P12", "scale": "best"}, "--scale best: not one of auto"),
        ({"codebook": "E8P12", "scale": "auto", "scale_override": 1.0}, "tries several scales"),
        ({"codebook": "E8P12", "faithful": True, "range_": "8"}, "--faithful fixes --range tensor"),
        ({"codebook": "E8P12", "rotation": "dct"}, "--rotation dct: not one of kronecker, blocked"),
        ({"codebook": "E8P12", "hadamard_block": 1}, "--hadamard_block 1: a block has at least 2"),
        (
            {"codebook": "E8P12", "rotation": "blocked", "hadamard_block": 8},
            "--hadamard_block 8 speaks of --rotation hadamard",
        ),
        (
            {"wbits": 2, "rotation": "hadamard"},
            "--rotation hadamard speaks of rotations",
        ),
        (
            {"wbits": 2, "incoh_processing": True, "rotation": "hadamard", "pre_proj_extra": 0},
            "--rotation and --pre_proj_extra both choose a rotation",
        ),
        (
            {"wbits": 2, "scale": "auto"},
            "E8P12RVQ4B: say --codebook E8P12, or leave it",
        ),
        ({"wbits": 2, "scale_override": 0.9}, "--scale_override 0.9 speaks of E8P12"),
        ({"wbits": 2, "no_fuse": True}, "--no_fuse speaks of E8P12"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(flags, reason):
    with pytest.raises(UsageError) as caught:
        build_recipe(**flags)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


# Whole models


def test_widths_that_a_recipe_cannot_do_are_refused_before_any_work(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr("quip.model.quantize.walk", None)
    how = build_recipe(codebook="E8P12", hadamard_block=24)
    with pytest.raises(UsageError, match=r"^model\.layers\.0\.self_attn\..* 24 does not divide"):
        quantize_model(model, tokens(), how, device="cpu", seed=0)
    how = build_recipe(codebook="E8P12")
    with pytest.raises(UsageError, match="the matrix: its 20 inputs are no multiple of 8"):
        how.check(8, 20)
    assert how.can_do(8, 24)
    assert not how.can_do(8, 20)


@pytest.mark.parametrize("name", ["opt", "llama", "gemma2", "phi", "gpt-neox", "bloom"])
def test_any_decoder_takes_lattices(name):
    before, away = logits(tiny(name)), []
    for codebook in LATTICES:
        model = tiny(name)
        quantize_model(model, tokens(), build_recipe(codebook=codebook), device="cpu", seed=0)
        away.append(float((logits(model) - before).norm() / before.norm()))
    assert away == sorted(away, reverse=True)


def test_a_stack_without_a_hadamard_matrix_is_quantized_one_by_one(monkeypatch):
    asked = []
    monkeypatch.setattr(recipe.Recipe, "can_do", lambda self, m, n: asked.append((m, n)))
    model = tiny("llama")
    quantize_model(model, tokens(), build_recipe(codebook="E8P12"), device="cpu", seed=0)
    assert set(asked) == {(32 + 16 + 16, 32), (48 + 48, 32)}
    assert not stacks(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@NAMES
def test_a_gpu_loses_as_little(problem, codebook):
    W, H = problem(48, 64)
    ours = quantized(W.float().cuda(), H.cuda(), codebook=codebook).dequantize().cpu()
    expected = loss(W.float(), H, codebook=codebook)
    assert proxy_loss(W, ours, H) == pytest.approx(expected, rel=0.05)
