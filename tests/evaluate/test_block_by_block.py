"""A model whose blocks stay in their files is measured to the same numbers, bit for bit."""

import pytest
import torch

from quip.errors import NonFinite, UsageError
from quip.evaluate.divergence import divergence
from quip.evaluate.perplexity import perplexity
from quip.model.load import load_model
from quip.model.matrices import find_blocks
from quip.model.passed import Passage, pass_blocks
from tests.support.runs import save_model
from tests.support.tiny import CONFIGS, EAGER_ONLY, VOCAB, tiny, tokens


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_comes_after_the_blocks_is_the_models_own(name, batch_size):
    model, ids = tiny(name, "eager" if name in EAGER_ONLY else "sdpa"), tokens()
    how = Passage(device="cpu", batch_size=batch_size)
    expected = [model(input_ids=batch, use_cache=False).logits for batch in ids.split(batch_size)]
    passed = pass_blocks(model, ids, how, stream=None, what="logits")
    for block in find_blocks(model)[1]:
        block.to("meta")  # nothing of it is looked at any more
    with passed.standing_in(model, "cpu"):
        found = [model(input_ids=batch, use_cache=False).logits for batch in ids.split(batch_size)]
    assert all(map(torch.equal, found, expected))


def test_windows_that_have_not_passed_are_refused():
    model, ids = tiny("llama"), tokens()
    passed = pass_blocks(model, ids, Passage(device="cpu"), stream=None, what="logits")
    with passed.standing_in(model, "cpu"), pytest.raises(UsageError, match="other windows"):
        model(input_ids=(ids[:1] + 1) % VOCAB, use_cache=False)
    assert torch.equal(model(input_ids=ids).logits, tiny("llama")(input_ids=ids).logits)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, each as it is and streamed."""
    folder = tmp_path_factory.mktemp("models")
    names = [save_model(folder / name) for name in ("one", "other")]
    broken = load_model(names[1])
    with torch.no_grad():
        broken.model.get_output_embeddings().weight.mul_(1.5)
    broken.model.save_pretrained(names[1])
    return [(load_model(name), load_model(name, stream="on")) for name in names]


def test_perplexity_and_divergence_are_those_of_the_whole_model(models):
    (whole, streamed), (reference, distant) = models
    ids = tokens() % whole.model.config.vocab_size
    expected = perplexity(whole.model, ids, device="cpu")
    assert perplexity(streamed.model, ids, device="cpu", stream=streamed.stream) == expected
    found = divergence(
        streamed.model,
        distant.model,
        ids,
        device="cpu",
        stream=streamed.stream,
        reference_stream=distant.stream,
    )
    assert found == divergence(whole.model, reference.model, ids, device="cpu")
    assert found.kl > 0
    assert all(p.is_meta for p in find_blocks(streamed.model)[1].parameters())


def test_activations_that_overflow_are_found_in_their_block():
    model, ids = tiny("llama"), tokens()
    find_blocks(model)[1][2].mlp.down_proj.weight.data.fill_(3e38)
    with pytest.raises(NonFinite) as whole:
        perplexity(model, ids, device="cpu")
    with pytest.raises(NonFinite) as passed:
        pass_blocks(model, ids, Passage(device="cpu"), stream=None, what="perplexity")
    assert str(passed.value) == str(whole.value)
    assert "in model.layers.2" in str(passed.value)
