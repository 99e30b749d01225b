"""Coverage: every matrix of a model is quantized, listed as kept, or refused by name."""

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quip.errors import NonFinite, UnsupportedModel
from quip.model.matrices import Matrix, check_weights, coverage, covered, find_blocks, places
from quip.model.walk import walk
from quip.packed.experts import Experts, unfuse
from tests.support.mixtures import MIXTURES, mixture
from tests.support.tiny import CONFIGS, GQA, VOCAB, tiny, tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_is_quantized_or_kept(name):
    model = tiny(name)
    prefix, blocks = find_blocks(model)
    found = coverage(model)
    matrices = [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim >= 2
    ]
    assert sorted(found.quantized + found.kept) == sorted(matrices)
    assert all(name.startswith(f"{prefix}.") for name in found.quantized)
    linears = [m for m in blocks.modules() if isinstance(m, nn.Linear)]
    assert [model.get_submodule(name) for name in found.quantized] == linears
    walked = [name for block in walk(model, tokens(1), device="cpu") for name in block.matrices()]
    assert walked == list(found.quantized)


def test_heads_embeddings_and_outer_projections_are_kept():
    assert set(coverage(tiny("opt-350m")).kept) == {
        "model.decoder.embed_tokens",
        "model.decoder.embed_positions",
        "model.decoder.project_in",
        "model.decoder.project_out",
        "lm_head",
    }


@pytest.mark.parametrize(
    ("config", "culprit"),
    [
        (hf.MixtralConfig(**GQA, num_local_experts=4), r"layers\.0\.mlp\.experts\.gate_up_proj"),
        (
            hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB),
            r"A_log.*MambaMixer",
        ),
    ],
    ids=["experts that are fused", "mamba"],
)
def test_a_model_whose_matrices_would_be_skipped_is_refused_by_name(config, culprit):
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match=culprit):
        coverage(model)
    with pytest.raises(UnsupportedModel, match=culprit):
        next(walk(model, tokens(), device="cpu"))


def test_tied_matrices_are_refused_by_name():
    model = tiny("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj.* tied to .*layers\.2"):
        coverage(model)


def test_a_linear_with_a_forward_of_its_own_is_refused():
    class Ternary(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.sign().T

    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = Ternary(32, 48, bias=False)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj.*Ternary"):
        coverage(model)


def test_a_model_without_exactly_one_uniform_decoder_is_refused():
    model = nn.Module()
    with pytest.raises(UnsupportedModel, match=r"no nn\.ModuleList"):
        find_blocks(model)
    model.encoder = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert find_blocks(model)[0] == "encoder"
    model.decoder = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(UnsupportedModel, match=r"2 blocks \(encoder, decoder\)"):
        find_blocks(model)
    model.decoder.append(nn.Identity())
    with pytest.raises(UnsupportedModel, match=r"2 classes \(Identity, Linear\)"):
        find_blocks(model)


def test_the_experts_of_a_block_are_not_taken_for_the_decoder():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    for layer in model.layers:
        layer.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(8)])
    assert find_blocks(model)[0] == "layers"


def test_weights_that_are_not_finite_are_named():
    model = tiny("opt")
    check_weights(model)
    for value in (torch.nan, torch.inf, -torch.inf):
        model.model.decoder.layers[2].fc1.weight.data[3, 5] = value
        with pytest.raises(NonFinite, match=r"layers\.2\.fc1\.weight"):
            check_weights(model)


def test_a_conv1d_is_a_linear_that_holds_its_matrix_transposed():
    linear, conv = nn.Linear(5, 4, bias=False), Conv1D(4, 5)
    alone, flipped = Matrix("proj", linear), Matrix("c_proj", conv)
    assert alone.weight is linear.weight  # not a view of it: a parameter stays one
    assert alone.bias is None
    assert flipped.bias is conv.bias
    assert [(x.rows, x.columns) for x in (alone, flipped)] == [(4, 5), (4, 5)]
    x = torch.randn(3, 5)
    torch.testing.assert_close(conv(x), x @ flipped.weight.T + flipped.bias)


@pytest.mark.parametrize("name", MIXTURES)
def test_of_a_mixture_all_but_routers_and_gates_of_shared_experts_is_quantized(name):
    model = mixture(name)
    unfuse(model)
    found = coverage(model)
    routers = {x for x in found.kept if "layers" in x}
    assert {x.rpartition(".")[2] for x in routers} <= {"gate", "router", "shared_expert_gate"}
    prefix, blocks = find_blocks(model)
    inside = {n.removesuffix(".weight") for n, x in model.named_parameters() if x.ndim > 1}
    assert {x for x in inside if x.startswith(prefix)} == routers | {*found.quantized}
    mixtures = [module for module in blocks.modules() if isinstance(module, Experts)]
    assert len(mixtures) * (1 + (name == "qwen2-moe")) == len(routers)
    assert sum(".experts." in x for x in found.quantized) == len(mixtures) * 4 * 2


def test_a_shared_expert_as_wide_as_there_are_experts_is_quantized():
    config = hf.Qwen2MoeConfig(
        **GQA, num_experts=6, moe_intermediate_size=16, shared_expert_intermediate_size=6
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    unfuse(model)
    assert "model.layers.0.mlp.shared_expert.up_proj" in coverage(model).quantized


def test_the_matrices_of_a_block_are_those_that_are_covered():
    model = tiny("llama")
    block = next(walk(model, tokens(1), device="cpu"))
    found = block.matrices()
    assert [(x.name, x.module) for x in covered(model)[: len(found)]] == [
        (name, model.get_submodule(name)) for name in found
    ]
    assert {x: n for x, (_, n) in places(model).items()} == {
        x.name: x.module.in_features for x in covered(model)
    }
    prefix, blocks = find_blocks(model)
    for name, (block, _) in places(model).items():
        assert model.get_submodule(name) in set(blocks[block].modules())
        assert name.startswith(f"{prefix}.{block}.")
