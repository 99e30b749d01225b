"""A model that overflows: every measure of it says where, and none gives a number."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from quip.errors import NonFinite
from quip.evaluate.divergence import divergence
from quip.evaluate.perplexity import perplexity
from quip.evaluate.speed import speed
from quip.evaluate.zeroshot import ZeroShot, zeroshot
from quip.model.finite import finite_predictions
from quip.model.tune import ModelTuning, tune_model
from tests.support.tiny import tiny, tokens
from tests.support.tokenizer import save_tokenizer

LAYER = "model.decoder.layers"
WHERE = rf"activations first become (infinite|NaN) in {LAYER}.2 \(torch.float32\); evaluate with"


def overflowing():
    model = tiny("opt", positions=600)
    model.get_submodule(f"{LAYER}.2").fc2.bias.data.fill_(torch.inf)
    return model


def measures():
    ids = tokens(2)
    sound = tiny("opt", positions=600)
    return {
        "perplexity": lambda x: perplexity(x, ids, device="cpu"),
        "divergence": lambda x: divergence(x, sound, ids, device="cpu"),
        "divergence from it": lambda x: divergence(sound, x, ids, device="cpu"),
        "speed": lambda x: speed(x, device="cpu", prompt_tokens=4, new_tokens=2, repeats=1),
        "tuning": lambda x: tune_model(
            x, sound, tokens(4), ModelTuning(epochs=1), device="cpu", seed=0
        ),
    }


@pytest.mark.parametrize("name", measures())
def test_every_measure_says_where_activations_became_infinite(name):
    model = overflowing()
    with pytest.raises(NonFinite, match=WHERE):
        measures()[name](model)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_a_zero_shot_score_of_a_model_that_predicts_nothing_is_no_number(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    asked = ZeroShot(tasks=("quip_demo_cloze",), limit=2)
    with pytest.raises(NonFinite, match=f"a zero-shot score is not finite: {WHERE}"):
        zeroshot(overflowing(), tokenizer, asked, device="cpu")


@pytest.mark.parametrize(
    ("parameter", "where"),
    [
        ("model.decoder.embed_tokens.weight", rf"before {LAYER}.0"),
        ("model.decoder.final_layer_norm.bias", rf"after the last block of {LAYER}"),
    ],
)
def test_what_lies_outside_the_blocks_is_named_too(parameter, where):
    model = tiny("opt")
    model.get_parameter(parameter).data.fill_(torch.inf)
    with pytest.raises(NonFinite, match=where), finite_predictions(model, "x"):
        model(input_ids=tokens(1))


def test_a_token_that_is_excluded_is_no_overflow():
    model = tiny("opt")
    with finite_predictions(model, "x"):
        hook = model.lm_head.register_forward_hook(
            lambda _, args, y: y.index_fill(-1, torch.tensor([3]), -torch.inf)
        )
        assert model(input_ids=tokens(1)).logits.isinf().any()
        hook.remove()
