"""The walk: bit-exact replay of any decoder, and Hessians that are E[x x^T]."""

from functools import partial

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from quip.errors import NonFinite, UsageError
from quip.model.block import Block
from quip.model.calls import capture
from quip.model.matrices import check_weights, find_blocks
from quip.model.walk import blocks_at_rest, walk
from quip.packed.experts import unfuse
from tests.support.mixtures import MIXTURES, mixture
from tests.support.tiny import CONFIGS, EAGER_ONLY, SEQLEN, VOCAB, tiny, tokens

CASES = [(name, "eager") for name in CONFIGS]
CASES += [(name, "sdpa") for name in CONFIGS if name not in EAGER_ONLY]


@torch.no_grad()
def run(model: nn.Module, batches: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits, the hidden states entering each block, and those leaving the last."""
    _, blocks = find_blocks(model)
    entering: list[list[Tensor]] = [[] for _ in blocks]
    leaving = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].clone()))
        for block, kept in zip(blocks, entering, strict=True)
    ]
    hooks.append(blocks[-1].register_forward_hook(lambda *call: leaving.append(call[-1])))
    logits = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in batches])
    for hook in hooks:
        hook.remove()
    last = torch.cat([out[0] if isinstance(out, tuple) else out for out in leaving])
    return logits, [torch.cat(kept) for kept in entering], last


@torch.no_grad()
def finish(model: nn.Module, last: Block, batches: list[Tensor]) -> Tensor:
    """The logits of the model when the hidden states of the walk enter its last block."""
    stored = iter(last.hidden.split(len(batches[0])))
    hook = last.module.register_forward_pre_hook(lambda _, args: (next(stored), *args[1:]))
    logits = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in batches])
    hook.remove()
    return logits


def gpt2(_: str) -> nn.Module:
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=VOCAB)
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


MADE = [partial(tiny, name, attention) for name, attention in CASES]
MADE += [partial(mixture, name) for name in MIXTURES] + [partial(gpt2, "gpt2")]


@pytest.mark.parametrize("made", MADE, ids=lambda made: "-".join(made.args))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_replaying_every_block_reproduces_the_logits_exactly(made, batch_size):
    model, ids = made(), tokens()
    batches = list(ids.split(batch_size))  # the last holds one window of seven
    logits, entering, leaving = run(model, batches)
    unfuse(model)
    if "llama-4" in made.args:  # its products are batched over experts, and sum in another order
        torch.testing.assert_close(run(model, batches)[0], logits)
        logits, entering, leaving = run(model, batches)
    for block in walk(model, ids, device="cpu", batch_size=batch_size):
        assert torch.equal(block.hidden, entering[block.index])
    assert torch.equal(finish(model, block, batches), logits)
    block.replay()
    assert torch.equal(block.hidden, leaving)
    assert torch.equal(run(model, batches)[0], logits)


@torch.no_grad()
def second_moments(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """E[x x^T] in float64 of the inputs of every Linear in the model, by one hook each."""
    inputs: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kept = inputs[name] = []
            hook = lambda _, args, kept=kept: kept.append(args[0].double().flatten(0, -2))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hook))
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    joined = {name: torch.cat(kept) for name, kept in inputs.items()}
    return {name: x.T @ x / len(x) for name, x in joined.items()}


# The inputs of opt's fc1 and fc2 are flattened to [tokens, features], the others are not.
@pytest.mark.parametrize("name", ["opt", "opt-350m", "mistral", "gemma2", "phi", "bloom"])
def test_hessians_are_the_mean_of_x_xT_per_token(name):
    model, ids = tiny(name), tokens()
    expected = second_moments(model, ids)
    for block in walk(model, ids, device="cpu", batch_size=3):
        hessians = block.observe()
        assert set(hessians) == set(block.matrices())
        for matrix, hessian in hessians.items():
            assert hessian.count == ids.numel()
            # Products and sums of 84 tokens in float32, relative to the largest entry.
            error = (hessian.value() - expected[matrix]).abs().max()
            assert error < 1e-5 * expected[matrix].abs().max()


def groups(model: nn.Module) -> list[set[str]]:
    """The matrices of block 0 that share a Hessian, by the last parts of their names."""
    hessians = next(walk(model, tokens(), device="cpu", batch_size=3)).observe()
    shared: dict[int, set[str]] = {}
    for name, hessian in hessians.items():
        shared.setdefault(id(hessian), set()).add(name.rpartition(".")[2])
    return list(shared.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("opt", [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}]),
        (
            "llama",
            [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
        ),
        ("phi", [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}]),
    ],
)
def test_matrices_fed_by_one_tensor_share_one_hessian(name, expected):
    found = groups(tiny(name))
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_a_changed_block_changes_the_inputs_of_the_next_as_in_the_model_itself():
    model, ids = tiny("llama"), tokens()
    changed = tiny("llama")
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        changed.get_submodule(name).weight.mul_(0.5)
    replacement = changed.get_submodule(name)
    _, before, _ = run(model, list(ids.split(3)))
    _, after, _ = run(changed, list(ids.split(3)))
    for block in walk(model, ids, device="cpu", batch_size=3):
        assert torch.equal(block.hidden, after[block.index])
        assert torch.equal(block.hidden, before[block.index]) == (block.index <= 1)
        if block.index == 1:
            block.observe()
            block.replace(name, replacement)
    assert model.get_submodule(name) is replacement


def test_replaced_matrices_are_no_longer_listed_or_observed():
    model = tiny("llama")
    block = next(walk(model, tokens(), device="cpu"))
    name = "model.layers.0.self_attn.q_proj"
    block.replace(name, nn.Sequential(nn.Identity()))
    assert not block.module.self_attn.q_proj.training
    assert name not in block.matrices()
    with pytest.raises(AttributeError):
        block.replace("model.layers.0.self_attn.z_proj", nn.Identity())


def test_hidden_states_keep_the_dtype_of_the_model():
    model, ids = tiny("opt", "sdpa", dtype=torch.bfloat16), tokens()
    _, entering, _ = run(model, list(ids.split(3)))
    for block in walk(model, ids, device="cpu", batch_size=3):
        assert block.hidden.dtype == torch.bfloat16
        assert torch.equal(block.hidden, entering[block.index])


def test_leaving_the_walk_early_leaves_the_model_as_it_was():
    model, ids = tiny("mistral"), tokens()
    logits, _, _ = run(model, [ids])
    for block in walk(model, ids, device="cpu"):
        if block.index == 1:
            break
    assert torch.equal(run(model, [ids])[0], logits)
    assert not any("forward" in vars(block) for block in find_blocks(model)[1])


def test_masks_are_held_once_for_all_batches_of_one_shape_and_all_blocks():
    model = tiny("mistral")
    parts = tokens().split(3)
    calls = [call for _, call in capture(model, parts, device=torch.device("cpu"))]
    held = {
        id(leaf): tuple(leaf.shape)
        for batch in calls
        for call in batch
        for leaf in call.leaves
        if isinstance(leaf, Tensor) and leaf.ndim == 4
    }
    assert sorted(held.values()) == [(1, 1, SEQLEN, SEQLEN), (3, 1, SEQLEN, SEQLEN)]


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(UsageError, match=r"eval\(\)"):
        next(walk(tiny("opt").train(), tokens(), device="cpu"))


def test_activations_that_are_not_finite_are_named():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1e38)  # finite, but products are not
    check_weights(model)
    blocks = walk(model, tokens(), device="cpu")
    next(blocks).observe()
    second = next(blocks)
    with pytest.raises(NonFinite, match=r"layers\.1\.mlp\.down_proj.*inputs"):
        second.observe()


@pytest.mark.parametrize("passing", [True, False])
def test_each_block_is_moved_to_the_device_and_back_also_when_its_turn_fails(monkeypatch, passing):
    model, moves = tiny("llama"), []

    def to(module: nn.Module, device: torch.device) -> nn.Module:
        moves.append((module, str(device)))
        return module

    blocks = list(model.model.layers)
    monkeypatch.setattr(type(blocks[0]), "to", to)
    device = torch.device("cpu", 0)  # another than the host by name
    walked = (
        walk(model, tokens(), device=device) if passing else blocks_at_rest(model, device=device)
    )
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for block in walked:
            assert moves[-1] == (block.module, "cpu:0")
            if block.index == 1:
                raise ZeroDivisionError
    walked.close()
    expected = [(block, device) for block in blocks[:2] for device in ("cpu:0", "cpu")]
    assert moves[2 * passing :] == expected  # a walk asks block 0 first what it returns


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_running_block_is_on_the_device_and_those_to_come_are_not():
    model, ids = tiny("mistral"), tokens()
    expected = second_moments(model, ids)
    for block in walk(model, ids, device="cuda", batch_size=3):
        devices = {name: parameter.device.type for name, parameter in model.named_parameters()}
        kinds = {i: set() for i in range(4)}
        for name, kind in devices.items():
            if name.startswith("model.layers."):
                kinds[int(name.split(".")[2])].add(kind)
            else:
                assert kind == "cpu"
        assert kinds[block.index] == {"cuda"}
        assert all(kinds[i] == {"cpu"} for i in range(block.index + 1, 4))
        for name, hessian in block.observe().items():
            error = (hessian.value().cpu() - expected[name]).abs().max()
            assert error < 1e-3 * expected[name].abs().max()  # other kernels, perhaps TF32
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
