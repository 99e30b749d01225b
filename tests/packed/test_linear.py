"""QuantizedLinear computes what nn.Linear with W_hat computes, and holds the packed matrix only."""

import copy
import gc
import io
import json
import pickle
import types
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quip.errors import QuipError
from quip.kernels.grid_matvec import cpu, reference
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for
from quip.packed.linear import QuantizedLinear
from quip.packed.matrix import QuantizedMatrix
from quip.packed.spec import Spec
from quip.transforms import Chain
from quip.transforms.vectors import Vectors
from tests.laws import GRIDS, assert_near
from tests.support.checkpoints import quantized
from tests.support.tiny import tokens

M, N = 24, 40
FEW, MANY = 3, 50  # tokens: below and above 2 m n / (m + n) = 30
INCOHERENT = GRIDS["column"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def matrix(
    flags: dict[str, object] = INCOHERENT, m: int = M, n: int = N, wbits: int = 3
) -> QuantizedMatrix:
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=rng)
    x = torch.randn(2 * n, n, generator=rng, dtype=torch.float64)
    recipe = build_recipe(quant="nearest", wbits=wbits, **flags)
    return quantize_matrix(W, x.T @ x / len(x), recipe, rng=rng_for(0, "w"))


def layer(flags: dict[str, object] = INCOHERENT, *, bias: bool = True, **size) -> QuantizedLinear:
    q = matrix(flags, **size)
    return QuantizedLinear.from_matrix(q, torch.linspace(-1, 1, len(q.codes)) if bias else None)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def empty(of: QuantizedLinear, **options) -> QuantizedLinear:
    return QuantizedLinear(
        of.in_features, of.out_features, of.bias is not None, spec=of.spec, **options
    )


def assert_same(a: QuantizedLinear, b: QuantizedLinear) -> None:
    """The same tensors, and the same results of both ways to multiply."""
    assert a.spec == b.spec
    ours, theirs = a.state_dict(), b.state_dict()
    assert {k: x.dtype for k, x in ours.items()} == {k: x.dtype for k, x in theirs.items()}
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    for count in (FEW, MANY):
        x = inputs(count, a.in_features)
        assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_answer_is_that_of_the_dense_layer(grid, bias, dtype):
    q = matrix(GRIDS[grid])
    W_hat = q.transform.undo(q.decoder.decode(q.codes).double())
    b = torch.linspace(-1, 1, M).to(dtype) if bias else None
    packed = QuantizedLinear.from_matrix(q, b)
    # Of float64 only rounding noise is left. Half precision rounds x, W~ and y once each, and
    # sums in any order; the sum of 40 products loses a few units more.
    noise = 1e-13 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for count in (0, 1, FEW, MANY):
        x = inputs(count, N, dtype=dtype)
        y = packed(x)
        assert y.dtype == dtype
        assert_near(y.double(), linear(x.double(), W_hat, b if b is None else b.double()), noise)


@pytest.mark.parametrize("grid", ["row", "column"])
@pytest.mark.parametrize("shape", [(N,), (1, N), (2, 3, N), (2, 25, N), (0, N), (2, 0, N)], ids=str)
def test_inputs_of_any_shape_are_taken_as_by_nn_linear(grid, shape):
    packed, x = layer(GRIDS[grid]), inputs(*shape)
    expected = packed.to_linear()(x)
    assert packed(x).shape == expected.shape
    assert_near(packed(x), expected, 1e-6)
    x = inputs(*shape[:-1], 2 * N)[..., ::2]  # strided
    assert torch.equal(packed(x), packed(x.contiguous()))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("width", [N - 1, N + 1])
def test_inputs_of_another_width_are_refused(grid, width):
    with pytest.raises(ValueError, match=f"inputs of {width} numbers, to a matrix for {N}"):
        layer(GRIDS[grid])(inputs(FEW, width))


def test_few_tokens_transform_activations_and_many_transform_weights(monkeypatch):
    calls = []
    for owner, name in ((Vectors, "input"), (Chain, "undo")):
        plain = getattr(owner, name)
        spied = lambda *args, name=name, plain=plain: calls.append(name) or plain(*args)  # noqa: E731
        monkeypatch.setattr(owner, name, spied)
    packed = layer()
    for count, expected in ((FEW, "input"), (30, "input"), (31, "undo")):
        packed(inputs(count, N))
        assert calls.pop() == expected
        assert not calls


def test_gradients_reach_the_inputs():
    packed = layer()
    for count in (FEW, MANY):
        x = inputs(count, N).requires_grad_()
        packed(x).sum().backward()
        assert_near(x.grad, packed.dequantize().sum(0).expand(count, N), 1e-5)


@pytest.mark.parametrize("wbits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_buffers_take_the_bits_that_are_reported(grid, wbits):
    q = matrix(GRIDS[grid], wbits=wbits)
    packed = QuantizedLinear.from_matrix(q, None)
    held = sum(x.nbytes for x in packed.buffers())
    assert held == pytest.approx(q.bits_per_weight * M * N / 8)
    assert not list(packed.parameters())


def reachable(module: nn.Module) -> int:
    """The bytes of all storages that the garbage collector finds from the module onwards."""
    seen, storages, todo = set(), {}, [vars(module)]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        todo += gc.get_referents(x)
    return sum(storages.values())


@pytest.mark.parametrize("grid", GRIDS)
def test_no_dense_matrix_is_kept_after_a_forward(grid):
    m, n = 512, 1024
    packed = layer(GRIDS[grid], m=m, n=n, wbits=2, bias=False)
    stored = sum(x.nbytes for x in packed.buffers())
    assert reachable(packed) == stored
    for dtype in (torch.float32, torch.bfloat16):
        for count in (FEW, 700):
            packed(inputs(count, n, dtype=dtype))
    # Beside the packed tensors, what decodes them: permutations, rotations and zeros unpacked.
    # Blocked rotations have p and q factors where others have one, and take more than the codes.
    blocked = GRIDS[grid].get("pre_proj_extra") is not None
    assert reachable(packed) < m * n * 2 * (0.9 if blocked else 1 / 3)  # dense in half precision


def test_a_model_holds_one_dense_matrix_at_a_time(monkeypatch):
    made: list[weakref.ref] = []

    def watch(owner, name):
        plain = getattr(owner, name)

        def watched(*arguments):
            if owner is not Chain:
                assert not any(ref() is not None for ref in made), "the one before is still there"
            y = plain(*arguments)
            made.append(weakref.ref(y))
            return y

        monkeypatch.setattr(owner, name, watched)

    model = quantized("llama", blocks=2)
    watch(reference, "decode")
    watch(cpu, "decode")
    watch(Chain, "undo")
    gc.disable()  # what only the collector frees is kept too long
    try:
        with torch.no_grad():
            model(tokens(1))
            model(tokens())
            assert len(made) == 2 * 14 + 14  # decoded twice, transformed back once
            model(tokens(1)[:, :2])
    finally:
        gc.enable()
    native = cpu.FORM.available()
    assert len(made) == 3 * 14 + (0 if native else 14)  # the kernel never decodes a matrix
    assert not any(ref() is not None for ref in made)


def test_a_layer_that_moved_holds_nothing_of_where_it_was():
    packed = layer(GRIDS["column"])
    packed(inputs(FEW, N))
    before = [weakref.ref(x) for x in packed.buffers()]
    packed.to("meta")
    gc.collect()
    assert not any(ref() is not None for ref in before)


def test_what_was_made_without_gradients_serves_with_them():
    packed = layer(GRIDS["column"])
    with torch.inference_mode():
        packed(inputs(FEW, N))
    x = inputs(FEW, N).requires_grad_()
    packed(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("grid", GRIDS)
def test_casts_change_the_bias_and_nothing_else(grid):
    packed, given = layer(GRIDS[grid]), layer(GRIDS[grid])
    stored = {name: x.clone() for name, x in packed.stored().items()}
    for cast in (lambda: packed.half(), lambda: packed.to(torch.bfloat16), packed.double):
        assert cast() is packed
        assert packed.bias.dtype not in (None, torch.float32)
        found = packed.stored()
        assert {k: x.dtype for k, x in found.items()} == {k: x.dtype for k, x in stored.items()}
        assert all(torch.equal(x, stored[name]) for name, x in found.items())
    assert packed(inputs(FEW, N).double()).dtype == torch.float64
    packed.float().bias.copy_(given.bias)
    assert_same(packed, given)


def test_an_error_in_a_move_leaves_the_layer_as_it_was():
    packed = layer()

    def fail(x: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        packed._apply(fail)
    assert_same(packed, layer())


@pytest.mark.parametrize("grid", GRIDS)
def test_a_saved_state_fills_an_empty_layer(grid):
    full = layer(GRIDS[grid])
    file = io.BytesIO()
    torch.save(full.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for device in ("cpu", "meta"):
        made = empty(full, device=device).to_empty(device="cpu")
        assert made.load_state_dict(state) == ([], [])
        assert_same(made, full)
    made = empty(full, device="meta")
    made.load_state_dict(state, assign=True)
    assert_same(made, full)


def test_a_layer_goes_to_the_meta_device_and_comes_back_empty():
    packed = layer()
    packed(inputs(FEW, N))
    dtypes = {name: x.dtype for name, x in packed.state_dict().items()}
    packed.to("meta")
    assert all(x.is_meta for x in packed.state_dict().values())
    packed.to_empty(device="cpu")
    assert {name: x.dtype for name, x in packed.state_dict().items()} == dtypes
    packed.load_state_dict(layer().state_dict())
    assert_same(packed, layer())


def test_a_buffer_that_is_changed_in_place_is_noticed():
    packed = layer()
    for count in (FEW, MANY):
        x = inputs(count, N)
        before = packed(x) - packed.bias
        packed.step.mul_(2)
        assert_near(packed(x) - packed.bias, 2 * before, 1e-6)
    other = layer(bias=True)
    with torch.no_grad():
        other.codes.copy_(other.codes.flip(0))
    packed.load_state_dict(other.state_dict())
    assert_same(packed, other)
    packed.step = torch.full_like(packed.step, torch.nan)
    with pytest.raises(QuipError, match="a step of its grid is not a positive number"):
        packed.check()
    with pytest.raises(QuipError, match="a step of its grid is not a positive number"):
        packed(inputs(FEW, N))


def test_a_layer_made_and_run_in_inference_mode_gives_the_same():
    with torch.inference_mode():
        made = layer()
        moved = layer().to(torch.float16).to(torch.float32)
        for count in (FEW, MANY):
            x = inputs(count, N)
            expected = layer()(x)
            assert torch.equal(made(x), expected)
            assert torch.equal(made(x), expected)
            assert moved(x).shape == expected.shape
    assert torch.equal(made(inputs(FEW, N)), layer()(inputs(FEW, N)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles_are_the_layer(grid, used):
    packed = layer(GRIDS[grid])
    if used:
        packed(inputs(FEW, N))
    for made in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert_same(made, layer(GRIDS[grid]))
        made.step.mul_(2)
        assert_near(made.dequantize(), 2 * packed.dequantize(), 1e-6)
    assert_same(packed, layer(GRIDS[grid]))
    assert len(pickle.dumps(packed)) == len(pickle.dumps(layer(GRIDS[grid])))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_dense_layer_holds_w_hat_exactly(grid):
    q = matrix(GRIDS[grid])
    packed = QuantizedLinear.from_matrix(q, None)
    assert torch.equal(packed.dequantize(), q.dequantize())
    plain = packed.to_linear()
    assert type(plain) is nn.Linear
    assert (plain.in_features, plain.out_features, plain.bias) == (N, M, None)
    assert torch.equal(plain.weight, q.dequantize())
    half = layer(GRIDS[grid]).to_linear(torch.bfloat16)
    assert torch.equal(half.weight, q.dequantize().bfloat16())
    assert half.bias.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in half.parameters())


@pytest.mark.parametrize("grid", GRIDS)
def test_a_specification_survives_json(grid):
    spec = layer(GRIDS[grid]).spec
    assert Spec.from_json(**json.loads(json.dumps(spec.to_json()))) == spec
    layout = spec.empty(M, N)
    assert {k: (x.shape, x.dtype) for k, x in layout.items()} == {
        k: (x.shape, x.dtype) for k, x in matrix(GRIDS[grid]).tensors().items()
    }


GRID = {"kind": "grid", "bits": 2, "group": 1, "symmetric": True}


@pytest.mark.parametrize(
    ("codebook", "transforms", "reason"),
    [
        (
            {"kind": "e8p"},
            [],
            "a codebook of kind 'e8p', and this version of quip knows grid,",
        ),
        ({}, [], "a codebook of kind None"),
        ("grid", [], "a codebook of kind 'grid'"),
        ({"kind": ["grid"]}, [], "a codebook of kind ['grid']"),
        (GRID, [{"kind": "zork"}], "a transform of kind 'zork', and this version of quip"),
        (GRID, ["rescale"], "a transform of kind 'rescale'"),
        (GRID, [{"kind": "kronecker"}], "a transform {'kind': 'kronecker'}, which this version"),
        ({**GRID, "signs": True}, [], "'signs': True}, which this version of quip does not"),
        ({**GRID, "bits": 99}, [], "'bits': 99"),
        ({**GRID, "bits": "2"}, [], "'bits': '2'"),
        ({**GRID, "group": -1}, [], "'group': -1"),
    ],
)
def test_a_matrix_of_unknown_make_is_refused_in_a_line(codebook, transforms, reason):
    with pytest.raises(QuipError) as caught:
        Spec.from_json(codebook, transforms)
    line = str(caught.value)
    assert line.startswith("its matrices have a ")
    assert reason in line
    assert "upgrade quip" in line
    assert "\n" not in line


def test_a_layer_says_what_it_is():
    assert repr(layer(m=4, n=6)) == (
        "QuantizedLinear(6, 4, bias=True, kind=grid bits=3 group=1 symmetric=True; kind=rescale; "
        "kind=kronecker blocked=False permute=True)"
    )
