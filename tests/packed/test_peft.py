"""Adapters are trained beside packed matrices, which stay as they are; what needs W is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import quip
from quip.errors import UnsupportedModel, UsageError
from quip.model.quantize import quantize_model
from quip.packed.checkpoint import to_dense
from quip.packed.linear import quantized_layers
from tests.support.checkpoints import QUIP, quantized, save
from tests.support.tiny import logits, tokens

peft = pytest.importorskip("peft")

from quip.packed.peft import PackedLora, register  # noqa: E402

TARGETS = r".*\.(q_proj|v_proj|down_proj|fc2)"


def config(**options: object) -> peft.LoraConfig:
    return register(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options))


@pytest.fixture(scope="module", params=["demo", "stacks"])
def folder(request, tmp_path_factory) -> Path:
    """A checkpoint of the demo, whose matrices are alone, and one with stacks."""
    if request.param == "demo":
        model = quip.load_model("demo").model
        quantize_model(model, tokens(), QUIP, device="cpu", seed=0)
    else:
        model = quantized("llama", {"codebook": "E8P12"}, blocks=2)
    return save(model, tmp_path_factory.mktemp("peft") / "model")


def stored(model: nn.Module) -> list[Tensor]:
    return [
        x.clone() for layer in quantized_layers(model).values() for x in layer.stored().values()
    ]


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(2), labels=tokens(2)).loss


def test_an_adapter_learns_beside_codes_that_stay_and_is_read_again(folder, tmp_path):
    packed = quip.load(folder)
    before, codes = logits(packed), stored(packed)
    torch.manual_seed(0)
    model = peft.get_peft_model(packed, config())
    adapters = [x for x in model.modules() if isinstance(x, PackedLora)]
    assert len(adapters) == 3 * packed.config.num_hidden_layers
    assert torch.equal(logits(model), before)  # B is zero at first
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert len(trained) == 2 * len(adapters)
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(loss(model))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(x.grad is not None and bool(x.grad.any()) for x in trained.values())
    after = stored(packed)
    assert len(after) == len(codes)
    assert all(map(torch.equal, codes, after))

    model.eval().save_pretrained(tmp_path)
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    read = peft.PeftModel.from_pretrained(
        quip.load(folder), tmp_path, config=register(peft.LoraConfig.from_pretrained(tmp_path))
    )
    assert torch.equal(logits(read), logits(model))


def test_gradients_of_an_adapter_are_those_beside_dense_weights(folder):
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, config(init_lora_weights=False))
        loss(tuned).backward()
        return {name: x.grad for name, x in tuned.named_parameters() if x.requires_grad}

    packed = gradients(quip.load(folder))
    dense = gradients(to_dense(quip.load(folder)))
    assert packed.keys() == dense.keys()
    for name, expected in dense.items():
        # float32 rounds W_hat once more in the dense model, and two blocks pass that on.
        torch.testing.assert_close(packed[name], expected, rtol=0, atol=1e-4 * expected.abs().max())


def test_the_trainer_takes_adapters_and_refuses_bare_codes(folder, tmp_path):
    options = TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(quip.load(folder), options, train_dataset=rows)
    packed = quip.load(folder)
    codes = stored(packed)
    model = peft.get_peft_model(packed, config())
    Trainer(model, options, train_dataset=rows).train()
    assert all(map(torch.equal, codes, stored(packed)))
    assert any(bool(x.any()) for name, x in model.named_parameters() if "lora_B" in name)


def test_a_second_adapter_and_the_hook_of_transformers_work(folder):
    packed = quip.load(folder)
    packed.add_adapter(config(), "first")
    packed.add_adapter(config(), "second")
    packed.set_adapter("second")
    assert packed.active_adapters() == ["second"]
    assert loss(packed).requires_grad


def test_what_needs_dense_weights_is_refused(folder):
    packed = quip.load(folder)
    with pytest.raises(UsageError, match=r"init_lora_weights='pissa'.*True, False, 'gaussian'"):
        peft.get_peft_model(packed, config(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="use_dora"):
        peft.get_peft_model(quip.load(folder), config(use_dora=True))
    model = peft.get_peft_model(quip.load(folder), config())
    with pytest.raises(UnsupportedModel, match="quip export DIR OUT --dense"):
        model.merge_and_unload()
