"""What is timed is greedy decoding: the tokens are those of generate()."""

import pytest
import torch
from torch import nn

from quip.errors import UnsupportedModel, UsageError
from quip.evaluate import speed as module
from quip.evaluate.bandwidth import bytes_read
from quip.evaluate.memory import module_bytes
from quip.evaluate.speed import Run, _decode, speed
from quip.packed.step import CAPTURES
from tests.support.tiny import VOCAB, tiny


@pytest.fixture(autouse=True)
def copied(monkeypatch) -> float:
    """What the device copies, without copying it."""
    monkeypatch.setattr(module, "copy_rate", lambda device: 1e9)
    return 1e9


def prompt(count: int = 9, texts: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (texts, count), generator=torch.Generator().manual_seed(3))


# Positions learned and rotary; windows that slide over the cache.
@pytest.mark.parametrize("name", ["opt", "llama", "gptj", "mistral", "gemma2"])
@torch.no_grad()
def test_the_tokens_are_those_of_generate(name):
    model, ids, count = tiny(name), prompt(), 12
    # Tied to the embedding, a random head repeats one token for ever.
    head, rng = model.get_output_embeddings(), torch.Generator().manual_seed(4)
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=rng))
    model.generation_config.eos_token_id = None  # a text is timed to its full length
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    run = _decode(model, ids, new_tokens=count)
    assert len(set(run.tokens[0].tolist())) > 4
    assert torch.equal(torch.cat([ids, run.tokens], dim=1), expected)
    assert run.prefill_seconds > 0
    assert run.token_seconds > 0
    assert not run.graph


@torch.no_grad()
def test_each_token_but_the_first_is_one_call_on_one_token():
    model, seen = tiny("llama"), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    _decode(model, prompt(9), new_tokens=4)
    assert seen == [(1, 9), (1, 1), (1, 1), (1, 1)]


@torch.no_grad()
def test_steps_of_fixed_size_are_timed_once_they_are_captured(monkeypatch):
    model, ids = tiny("llama", "sdpa"), prompt(texts=3)
    expected = _decode(model, ids, new_tokens=10).tokens
    made = []

    def capture(compute, device):
        made.append(len(clock))
        return compute

    clock: list[int] = []
    monkeypatch.setattr(module, "now", lambda device: clock.append(1) or float(len(clock)))
    monkeypatch.setitem(CAPTURES, "cpu", capture)
    run = _decode(model, ids, new_tokens=10)
    assert torch.equal(run.tokens, expected)
    assert run.graph
    assert made == [2]  # after the first token, and before the others are timed
    assert run.token_seconds == 1 / 7


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_speed_reports_what_was_run(name, copied):
    model = tiny(name)
    found = speed(model, device="cpu", prompt_tokens=8, new_tokens=5, repeats=2, batch=3)
    assert (found.prompt_tokens, found.new_tokens, found.repeats) == (8, 5, 2)
    assert (found.batch, found.graph) == (3, False)
    assert found.copy_bytes_per_second == copied
    steps = found.decode_tokens_per_second / 3
    assert found.bandwidth_share == pytest.approx(found.read_bytes * steps / copied)
    assert found.prefill_tokens_per_second > 0
    assert found.decode_tokens_per_second > 0
    assert found.model_bytes == module_bytes(model)
    assert found.peak_bytes > found.model_bytes


def test_rates_are_medians_after_one_warm_up(monkeypatch):
    # Seconds to the first token and of each other one; the first run warms up.
    times = iter([(99.0, 99.0), (2.0, 0.25), (4.0, 2.0), (100.0, 0.5)])
    prompts = []

    def decode(model, ids, *, new_tokens):
        prompts.append(ids)
        first, other = next(times)
        return Run(
            tokens=ids, prefill_seconds=first, token_seconds=other, cache_bytes=10, graph=True
        )

    monkeypatch.setattr(module, "_decode", decode)
    model = tiny("opt")
    found = speed(model, device="cpu", batch=2, prompt_tokens=8, new_tokens=5, repeats=3, seed=1)
    assert found.prefill_tokens_per_second == 16 / 4.0
    assert found.decode_tokens_per_second == 2 / 0.5
    assert found.read_bytes == bytes_read(model) + 10
    assert found.graph
    expected = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))
    assert len(prompts) == 4
    assert all(torch.equal(ids, expected) for ids in prompts)


def test_all_positions_may_be_used_and_no_more():
    model = tiny("opt")  # 32 positions
    speed(model, device="cpu", prompt_tokens=20, new_tokens=12, repeats=1)
    with pytest.raises(UsageError, match=r"20 prompt tokens and 13 new ones .* 32 positions"):
        speed(model, device="cpu", prompt_tokens=20, new_tokens=13, repeats=1)


def test_a_model_without_positions_has_no_limit():
    speed(tiny("bloom"), device="cpu", prompt_tokens=40, new_tokens=2, repeats=1)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("prompt_tokens", 0, 1), ("new_tokens", 1, 2), ("repeats", 0, 1), ("batch", 0, 1)],
)
def test_counts_too_small_to_time_are_refused(name, value, least):
    counts = {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1, name: value}
    with pytest.raises(UsageError, match=f"{name} is {value}; it must be at least {least}"):
        speed(tiny("opt"), device="cpu", **counts)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(UsageError, match=r"eval\(\)"):
        speed(tiny("opt").train(), device="cpu", prompt_tokens=4, new_tokens=2)


def test_a_model_that_keeps_no_cache_is_refused(monkeypatch):
    model = tiny("opt")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: forward(**kw | {"use_cache": False}))
    with pytest.raises(UnsupportedModel, match="OPTForCausalLM: it returns no key-value cache"):
        speed(model, device="cpu", prompt_tokens=4, new_tokens=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_model_returns_to_the_host_after_a_run_on_a_device():
    model = tiny("llama")
    found = speed(model, device="cuda", prompt_tokens=8, new_tokens=5, repeats=1)
    assert not found.peak_since_process_start
    assert found.peak_bytes >= found.model_bytes
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
