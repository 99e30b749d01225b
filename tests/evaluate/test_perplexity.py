"""Perplexity equals its definition, HF's own loss and GPTQ's recipe, on any batch and dtype."""

import math

import pytest
import torch
from torch import Tensor, nn

from quip.errors import NonFinite, UsageError
from quip.evaluate import perplexity as exported
from quip.evaluate.perplexity import CHUNK, perplexity
from tests.support.tiny import VOCAB, tiny, tokens


@torch.no_grad()
def plain(model: nn.Module, ids: Tensor) -> float:
    """Token by token, in float64 after the model: exp(mean over windows (mean -log p))."""
    windows = []
    for window in ids:
        logits = model(input_ids=window[None]).logits[0].double()
        chosen = [logits[t].log_softmax(-1)[window[t + 1]] for t in range(len(window) - 1)]
        windows.append(-sum(chosen) / len(chosen))
    return math.exp(sum(windows) / len(windows))


@pytest.mark.parametrize("name", ["opt", "llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_equals_its_definition(name, batch_size):
    model, ids = tiny(name), tokens()
    found = perplexity(model, ids, device="cpu", batch_size=batch_size)
    # log-softmax in float32, and other batch shapes in the model's own matrix products.
    assert found == pytest.approx(plain(model, ids), rel=1e-5)


def test_perplexity_equals_the_loss_of_transformers():
    model, ids = tiny("opt"), tokens()
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in ids]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, ids, device="cpu") == pytest.approx(expected, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = tiny("opt")
    for parameter in model.parameters():
        parameter.data.zero_()
    assert perplexity(model, tokens(), device="cpu") == pytest.approx(VOCAB, rel=1e-6)


class Fixed(nn.Module):
    """Answers with given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.eval()

    def forward(self, input_ids: Tensor, use_cache: bool) -> "Fixed":
        return self


def test_a_vocabulary_of_many_chunks_gives_the_same():
    rng = torch.Generator().manual_seed(0)
    vocab = CHUNK // 10  # ten positions a chunk at one window, five at two
    logits = torch.randn(2, 14, vocab, generator=rng)
    ids = torch.randint(vocab, (2, 14), generator=rng)
    chosen = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    found = perplexity(Fixed(logits), ids, device="cpu", batch_size=2)
    assert found == pytest.approx(float(chosen.mean().neg().exp()), rel=1e-5)


def test_log_softmax_is_taken_in_float32_for_any_dtype():
    model, ids = tiny("opt", "sdpa", dtype=torch.bfloat16), tokens()
    expected = plain(model, ids)
    # In bfloat16 itself the error would be near 1e-2.
    assert perplexity(model, ids, device="cpu") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [1e4, math.nan, math.inf])
def test_a_perplexity_that_is_not_finite_is_an_error(value):
    logits, ids = torch.zeros(1, 4, 5), torch.zeros(1, 4, dtype=torch.int64)
    logits[..., 1] = value
    with pytest.raises(NonFinite, match=r"^perplexity is not finite"):
        perplexity(Fixed(logits), ids, device="cpu")


def test_a_window_without_predictions_is_refused():
    for empty in (tokens()[:, :1], tokens()[:0]):
        with pytest.raises(UsageError, match="perplexity needs"):
            perplexity(tiny("opt"), empty, device="cpu")


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(UsageError, match=r"eval\(\)"):
        perplexity(tiny("opt").train(), tokens(), device="cpu")


def test_progress_is_shown_only_when_asked_for(capfd):
    model, ids = tiny("opt"), tokens(2)
    value = exported(model, ids, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert perplexity(model, ids, device="cpu", progress=True) == value
    assert f"perplexity={value:.2f}" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_model_returns_to_the_host_after_an_evaluation_on_a_device():
    model, ids = tiny("llama"), tokens()
    expected = perplexity(model, ids, device="cpu")
    assert perplexity(model, ids, device="cuda") == pytest.approx(expected, rel=1e-3)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
