"""Divergence equals its definition in float64, on any batch and dtype, and is zero on itself."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import Tensor, nn

from quip.errors import NonFinite, UsageError
from quip.evaluate.divergence import CHUNK, Divergence, divergence
from tests.support.tiny import tiny, tokens


def moved(model: nn.Module, by: float = 0.02) -> nn.Module:
    """The same model with noise in its weights."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=rng).to(parameter.dtype)
    return model


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> np.ndarray:
    """Window by window, in float64 after the model, of the positions that predict."""
    return np.stack([model(input_ids=w[None]).logits[0, :-1].double().numpy() for w in ids])


def by_definition(p_logits: np.ndarray, q_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL and agreement of each position, from scipy's relative entropy in float64."""
    p, q = (np.exp(log_softmax(x, axis=-1)) for x in (p_logits, q_logits))
    return rel_entr(p, q).sum(-1), p_logits.argmax(-1) == q_logits.argmax(-1)


def same_numbers(found: Divergence, kl: np.ndarray, same: np.ndarray, rel: float) -> None:
    windows = kl.mean(axis=1)
    assert found.kl == pytest.approx(windows.mean(), rel=rel)
    assert found.kl_std_error == pytest.approx(
        windows.std(ddof=1) / math.sqrt(len(windows)), rel=rel
    )
    assert found.kl_p99 == pytest.approx(np.sort(kl, axis=None)[math.ceil(0.99 * kl.size) - 1], rel)
    assert found.top1_agreement == pytest.approx(same.mean(), rel=1e-12)


@pytest.mark.parametrize("name", ["opt", "llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_divergence_equals_its_definition(name, batch_size):
    reference, model, ids = tiny(name), moved(tiny(name)), tokens(20)
    kl, same = by_definition(logits_of(reference, ids), logits_of(model, ids))
    assert 0 < same.mean() < 1
    found = divergence(model, reference, ids, device="cpu", batch_size=batch_size)
    # log-softmax in float32, and other batch shapes in the models' own matrix products.
    same_numbers(found, kl, same, rel=1e-4)


def test_the_reference_is_what_the_mean_is_taken_over():
    reference, model, ids = tiny("opt"), moved(tiny("opt"), 0.1), tokens()
    p, q = logits_of(reference, ids), logits_of(model, ids)
    forth, back = by_definition(p, q)[0].mean(), by_definition(q, p)[0].mean()
    assert forth != pytest.approx(back, rel=0.01)
    assert divergence(model, reference, ids, device="cpu").kl == pytest.approx(forth, rel=1e-4)
    assert divergence(reference, model, ids, device="cpu").kl == pytest.approx(back, rel=1e-4)


def test_a_model_does_not_diverge_from_itself():
    model = tiny("opt")
    found = divergence(model, model, tokens(), device="cpu")
    assert found == Divergence(kl=0.0, kl_std_error=0.0, kl_p99=0.0, top1_agreement=1.0)


def test_models_of_different_dtypes_are_compared_in_float32():
    reference, model = tiny("opt", "sdpa"), tiny("opt", "sdpa", dtype=torch.bfloat16)
    ids = tokens()
    kl, same = by_definition(logits_of(reference, ids), logits_of(model, ids))
    # In bfloat16 itself the error would be near 1e-2 nats, a multiple of this KL.
    same_numbers(divergence(model, reference, ids, device="cpu"), kl, same, rel=1e-3)


class Fixed(nn.Module):
    """Answers with given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.eval()

    def forward(self, input_ids: Tensor, use_cache: bool) -> "Fixed":
        return self


def fixed(p: Tensor, q: Tensor) -> Divergence:
    """The divergence of logits q from logits p, given for whole windows."""
    ids = torch.zeros(p.shape[:2], dtype=torch.int64)
    return divergence(Fixed(q), Fixed(p), ids, device="cpu", batch_size=len(p))


def test_a_vocabulary_of_many_chunks_gives_the_same(rng):
    vocab = CHUNK // 10  # five positions a chunk at two windows
    p = torch.randn(2, 14, vocab, generator=rng)
    noise = torch.randn(2, 14, vocab, generator=rng)
    q = p + torch.linspace(0.1, 0.4, 28).view(2, 14, 1) * noise  # each position its own KL
    kl, same = by_definition(p[:, :-1].double().numpy(), q[:, :-1].double().numpy())
    same_numbers(fixed(p, q), kl, same, rel=1e-4)


def test_the_last_position_predicts_nothing(rng):
    p = torch.randn(2, 4, 5, generator=rng)
    q = p.clone()
    q[:, -1] = 0
    assert fixed(p, q).kl == 0
    q[:, -2] = 0
    assert fixed(p, q).kl > 0


def test_rounding_is_not_clamped_into_a_bias(rng):
    p = torch.randn(1, 400, 5000, generator=rng)
    # A shift changes no probability: what is left is rounding, of either sign.
    assert abs(fixed(p, p + 3).kl) < 1e-7


def test_tokens_that_both_exclude_add_nothing_and_one_that_only_the_model_excludes_is_an_error():
    p = torch.zeros(2, 2, 4)
    p[..., 3] = -math.inf
    q = p.clone()
    assert fixed(p, q).kl == 0
    q[..., 2] = -math.inf
    assert fixed(q, p).kl == pytest.approx(math.log(3 / 2))
    with pytest.raises(NonFinite, match=r"^KL divergence is not finite"):
        fixed(p, q)


def test_nan_logits_of_either_model_are_an_error():
    p, q = torch.zeros(3, 200, 4), torch.zeros(3, 200, 4)
    q[1, 5, 2] = math.nan  # one position of 597, which the 99th percentile would step over
    for pair, whose in (((p, q), ""), ((q, p), ", of the reference,")):
        with pytest.raises(NonFinite, match=f"^KL divergence{whose} is not finite"):
            fixed(*pair)


def test_one_window_has_no_standard_error(recwarn):
    found = divergence(moved(tiny("opt")), tiny("opt"), tokens(1), device="cpu")
    assert math.isnan(found.kl_std_error)
    assert found.kl > 0
    assert not recwarn.list


def test_vocabularies_of_two_sizes_are_refused():
    p, q = torch.zeros(1, 3, 6), torch.zeros(1, 3, 8)
    with pytest.raises(UsageError, match="logits for 8 tokens, the reference for 6"):
        fixed(p, q)


def test_a_window_without_predictions_is_refused():
    for empty in (tokens()[:, :1], tokens()[:0]):
        with pytest.raises(UsageError, match="divergence needs"):
            divergence(tiny("opt"), tiny("opt"), empty, device="cpu")


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(UsageError, match=r"the model .*eval\(\)"):
        divergence(tiny("opt").train(), tiny("opt"), tokens(), device="cpu")
    with pytest.raises(UsageError, match=r"the reference .*eval\(\)"):
        divergence(tiny("opt"), tiny("opt").train(), tokens(), device="cpu")


def test_progress_is_shown_only_when_asked_for(capfd):
    model, reference, ids = moved(tiny("opt")), tiny("opt"), tokens(2)
    value = divergence(model, reference, ids, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert divergence(model, reference, ids, device="cpu", progress=True) == value
    assert f"kl={value.kl:.4g}" in capfd.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_both_models_return_to_the_host_after_an_evaluation_on_a_device():
    model, reference, ids = moved(tiny("llama")), tiny("llama"), tokens()
    expected = divergence(model, reference, ids, device="cpu")
    found = divergence(model, reference, ids, device="cuda")
    assert found.kl == pytest.approx(expected.kl, rel=1e-2)
    for module in (model, reference):
        assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
