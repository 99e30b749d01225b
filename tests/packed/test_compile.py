"""torch.compile of packed models: one graph, the same numbers, and one product for a stack."""

import copy

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel, StaticCache

from quip.matrix.build import build_recipe
from quip.model.load import load_model
from quip.model.quantize import quantize_model
from quip.model.tables import pack_tables
from quip.packed import ops
from quip.packed.linear import QuantizedLinear, quantized_layers
from quip.packed.parts import MADE, Parts
from tests.laws import assert_near
from tests.support.checkpoints import INCOHERENT, SHARP, VECTORS, quantized
from tests.support.mixtures import mixture, packed
from tests.support.tiny import logits, tiny, tokens

RECIPES = {
    "Kronecker rotations": INCOHERENT,
    "learned codebooks": VECTORS["2D"],
    "groups, not rotated": {"wbits": 4, "groupsize": 16, "quant": "nearest"},
}
NOISE = 1e-5  # of float32: a static cache and fused kernels add in another order


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Shapes are not checked while a graph is made: what checks them cannot be traced."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of the inputs of every product of a packed matrix."""
    seen, multiply = [], Parts.multiply

    def watched(self, x, codes):
        seen.append(tuple(x.shape))
        return multiply(self, x, codes)

    monkeypatch.setattr(Parts, "multiply", watched)
    return seen


def compiled(model: nn.Module, backend: str = "eager") -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("name", ["opt", "llama"])  # tied, and not
def test_a_packed_embedding_and_head_are_in_the_graph(name):
    model = tiny(name)
    pack_tables(model, 6, device="cpu")
    assert_near(logits(compiled(model)), logits(model), NOISE)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_is_one_graph_of_the_same_numbers(recipe, products):
    model = quantized("llama", RECIPES[recipe], blocks=1)
    expected = logits(model)
    count = len(products)
    assert count == len(quantized_layers(model))
    model.config.use_cache = False
    assert_near(logits(compiled(model)), expected, NOISE)
    assert len(products) == 2 * count


def test_no_token_with_a_static_cache_is_compiled_anew(products):
    model, ids = quantized("llama", SHARP, blocks=1), tokens(1)
    expected = logits(model, 1)[0]
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    step = compiled(model, "aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        model(input_ids=ids[:, :5], past_key_values=cache)
        products.clear()
        for i in range(5, ids.shape[1]):
            found = step(input_ids=ids[:, i : i + 1], past_key_values=cache).logits[0, 0]
            assert_near(found, expected[i], NOISE)
    # The members of a stack share theirs.
    assert len(products) == len(quantized_layers(model)) * (ids.shape[1] - 5)


class Together(nn.Module):
    """What layers answer that are asked the same."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def attention(flags: dict[str, object]) -> Together:
    """q, k and v of a Llama: three layers, or the members of a stack."""
    inner = quantized("llama", flags, blocks=1).model.layers[0].self_attn
    return Together(inner.q_proj, inner.k_proj, inner.v_proj)


@pytest.mark.parametrize("flags", [INCOHERENT, SHARP], ids=["single", "stacks"])
def test_gradients_of_inputs_are_those_without_a_graph(flags):
    layers = attention(flags)
    for count in (2, 60):  # activations, then weights, go through the transform
        x = torch.randn(count, 32, requires_grad=True)
        plain, fast = (
            torch.autograd.grad(sum(y.square().sum() for y in one(x)), x)[0]
            for one in (layers, compiled(layers, "aot_eager"))
        )
        assert_near(fast, plain, NOISE)


def layer(flags: dict[str, object] = INCOHERENT) -> QuantizedLinear:
    return next(iter(quantized_layers(attention(flags)).values()))


def test_the_operators_keep_what_torch_asks_of_one():
    packed = layer(SHARP)
    stored, sizes = list(packed.stored().values()), list(packed.sizes)
    x = torch.randn(2, 3, packed.in_features, dtype=torch.bfloat16, requires_grad=True)
    arguments = (x, stored, packed._words, sizes, len(sizes) - 1)
    torch.library.opcheck(ops.product, arguments)
    g = torch.randn(2, 3, sizes[-1], dtype=torch.bfloat16)
    torch.library.opcheck(ops.product_backward, (g, *arguments[1:], packed.in_features))
    torch.library.opcheck(ops.product, (*arguments[:-1], ops.ALL))


def test_all_members_of_a_stack_at_once_are_those_one_by_one():
    packed, x = layer(SHARP), torch.randn(3, 32, requires_grad=True)
    whole = packed.traced(x, ops.ALL)
    each = [packed.traced(x, i) for i in range(len(packed.sizes))]
    assert torch.equal(whole, torch.cat(each, dim=-1))
    g = torch.randn_like(whole)
    expected = torch.autograd.grad(torch.cat(each, dim=-1), x, g)[0]
    assert_near(torch.autograd.grad(whole, x, g)[0], expected, NOISE)


def test_compiled_code_sees_a_buffer_that_was_changed():
    packed, x = layer(), torch.randn(3, 32)
    fast = compiled(packed)
    before = fast(x)
    packed.step.mul_(2)
    assert_near(fast(x), 2 * before, 1e-6)
    packed.load_state_dict(layer().state_dict(), assign=True)
    assert torch.equal(fast(x), before)


def test_a_layer_and_its_compiled_code_unpack_its_tensors_once(monkeypatch):
    packed, x, made = layer(), torch.randn(3, 32), []
    restore = type(packed.spec).restore
    monkeypatch.setattr(
        type(packed.spec), "restore", lambda *args: made.append(1) or restore(*args)
    )
    packed._forget()
    assert torch.equal(compiled(packed)(x), packed(x))
    assert made == [1]


@pytest.mark.parametrize("flags", [INCOHERENT, SHARP], ids=["single", "stacks"])
def test_what_a_product_keeps_can_be_made_apart_before_it(flags, products):
    packed = layer(flags)
    stored, x = packed.stored(), torch.randn(3, 32)
    packed._forget()
    parts = ops.make_apart(stored, packed.spec, packed.sizes, 32, x)
    assert (parts.ready, products) == (True, [(1, 32)])
    assert MADE[packed.codes] is parts
    assert torch.equal(packed.product(x), parts.multiply(x, packed.codes))


def test_inputs_of_another_width_are_refused_by_compiled_code_too():
    packed = layer()
    with pytest.raises(Exception, match="inputs of 31 numbers, to a matrix for 32"):
        compiled(packed)(torch.randn(3, 31))


@pytest.mark.parametrize("flags", [INCOHERENT, SHARP], ids=["single", "stacks"])
def test_generate_of_transformers_takes_a_static_cache(flags):
    model = quantized("llama", flags, blocks=2)
    words = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(1)[:, :6], **words)
    found = model.generate(tokens(1)[:, :6], cache_implementation="static", **words)
    assert torch.equal(found, expected)


def test_generate_of_transformers_compiles_a_step_of_a_checkpoint(saved, products):
    model = AutoModelForCausalLM.from_pretrained(saved)
    ids = tokens(1)[:, :6]
    words = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **words)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    model.generation_config.cache_implementation = "static"
    products.clear()
    assert torch.equal(model.generate(ids, compile_config=config, **words), expected)
    assert model._compiled_call is not None
    assert len(products) == 5 * len(quantized_layers(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [INCOHERENT, SHARP], ids=["single", "stacks"])
def test_a_device_compiles_a_step_and_captures_it(flags):
    model, ids = quantized("llama", flags, blocks=2).to("cuda"), tokens(1)[:, :6].to("cuda")
    words = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **words)
    assert torch.equal(model.generate(ids, cache_implementation="static", **words), expected)
    assert model._compiled_call is not None


@pytest.fixture(params=[INCOHERENT, SHARP, VECTORS["2D"]], ids=["int", "E8P", "2D"])
def demo(request) -> PreTrainedModel:
    """The model of the package, quantized with Hessians of a few tokens."""
    model = load_model("demo").model
    recipe = build_recipe(**request.param)
    quantize_model(model, torch.arange(100, 140)[None], recipe, device="cpu", seed=0)
    return model.requires_grad_(False)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_a_packed_demo(demo, products):
    ids = torch.arange(100, 140)[None]
    expected = demo(ids, use_cache=False).logits
    fast = compiled(demo, "inductor")
    assert_near(fast(ids, use_cache=False).logits, expected, 1e-4)
    torch.compiler.reset()
    cache = StaticCache(config=demo.config, max_cache_len=64)
    demo(input_ids=ids[:, :30], past_key_values=cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(30, 40):
            inputs = demo.prepare_inputs_for_generation(
                ids[:, i : i + 1], past_key_values=cache, position_ids=torch.tensor([[i]])
            )
            products.clear()
            assert_near(fast(**inputs).logits[0, 0], expected[0, i], 1e-4)
            assert len(products) == len(quantized_layers(demo))


@pytest.mark.parametrize("name", ["mixtral", "llama-4"])
def test_a_mixture_is_one_graph_whichever_experts_run(name):
    model = packed(mixture(name), RECIPES["groups, not rotated"])
    model.config.use_cache = False
    expected, alone = logits(model, 2), copy.deepcopy(model)
    together = compiled(model)
    assert_near(logits(together, 2), expected, NOISE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        ids = tokens(2).flip(0)
        with torch.no_grad():
            assert_near(together(input_ids=ids).logits, expected.flip(0), NOISE)
    # A copy computes with its own weights, and goes on when the first one is gone.
    for matrix in quantized_layers(alone).values():
        matrix.step.mul_(2)
    changed = logits(alone, 2)
    assert not torch.equal(changed, expected)
    del model, together
    torch.compiler.reset()
    assert_near(logits(compiled(alone), 2), changed, NOISE)


@pytest.mark.slow
def test_what_trains_through_experts_is_compiled_too():
    model = packed(mixture("mixtral"), RECIPES["groups, not rotated"])
    model.config.use_cache = False
    model.model.embed_tokens.weight.requires_grad_()
    gradients = []
    for run in (model, torch.compile(model, backend="eager")):
        run(input_ids=tokens(2)).logits.square().mean().backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
        model.zero_grad()
    assert gradients[0].abs().max() > 0
    assert_near(gradients[1], gradients[0], NOISE)
