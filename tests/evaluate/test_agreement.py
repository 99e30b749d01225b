"""Agreement equals comparing texts written without a cache, one token at a time."""

import copy

import pytest
import torch
from torch import Tensor, nn

from quip.errors import NonFinite, UsageError
from quip.evaluate.agreement import Agreement, agreement, prompts_from
from quip.model.team import Team
from tests.support.teams import together
from tests.support.tiny import tiny, tokens


def talkative(name: str) -> nn.Module:
    """A tiny model with a head of its own: tied to the embedding it repeats one token for ever."""
    model, rng = tiny(name), torch.Generator().manual_seed(4)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=rng), requires_grad=False)
    return model


def moved(model: nn.Module, by: float) -> nn.Module:
    """The same model with noise in its weights."""
    model, rng = copy.deepcopy(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn(parameter.shape, generator=rng)
    return model


@torch.no_grad()
def text(model: nn.Module, prompt: Tensor, new: int) -> list[int]:
    """Every token from a forward of everything before it."""
    ids = prompt[None]
    for _ in range(new):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def equal_tokens(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


@pytest.mark.parametrize("name", ["opt", "llama", "gptj", "gemma2"])
def test_agreement_equals_its_definition(name):
    reference = talkative(name)
    model = moved(reference, 0.015)
    found = agreement(model, reference, tokens(), new_tokens=8, device="cpu", batch_size=3)
    equal = [equal_tokens(text(model, p, 8), text(reference, p, 8)) for p in tokens()]
    assert 0 < sum(equal) < 8 * len(equal)
    assert found == Agreement(
        prefix=sum(equal) / len(equal) / 8,
        whole=sum(count == 8 for count in equal) / len(equal),
        prompts=7,
        prompt_tokens=12,
        new_tokens=8,
    )


def test_a_model_agrees_with_itself_and_one_of_other_weights_does_not():
    model = talkative("llama")
    itself = agreement(model, model, tokens(), new_tokens=8, device="cpu")
    assert (itself.prefix, itself.whole) == (1, 1)
    other = agreement(moved(model, 1.0), model, tokens(), new_tokens=8, device="cpu")
    assert other.prefix < 0.1
    assert other.whole == 0


def test_a_text_is_left_where_all_have_differed():
    reference = talkative("llama")
    model, calls = moved(reference, 1.0), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    agreement(model, reference, tokens(1), new_tokens=16, device="cpu")
    assert len(calls) < 4


@pytest.mark.parametrize(("count", "batch_size", "size"), [(7, 2, 3), (2, 1, 3)])
def test_a_team_finds_what_one_does(count, batch_size, size):
    reference = talkative("llama")
    model = moved(reference, 0.015)

    def measured(team: Team):
        models = copy.deepcopy(model), copy.deepcopy(reference)
        how = {"device": "cpu", "batch_size": batch_size, "team": team}
        return agreement(*models, tokens(count), new_tokens=8, **how)

    assert together(size, measured) == [measured(Team())] * size


def test_prompts_are_pieces_of_windows_spread_over_all_of_them():
    windows = torch.arange(4 * 10).view(4, 10)
    found = prompts_from(windows, count=4, length=3)  # of 12 pieces, every third one
    assert found.tolist() == [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(4)]
    assert len(prompts_from(windows, count=12, length=3).unique(dim=0)) == 12
    with pytest.raises(UsageError, match=r"4 windows of 10 tokens make 12 prompts of 3, and 13"):
        prompts_from(windows, count=13, length=3)


def test_what_cannot_be_asked_for_is_refused():
    model, ids = tiny("opt"), tokens()
    agreement(model, model, ids, new_tokens=20, device="cpu")  # all 32 positions
    with pytest.raises(UsageError, match="33 tokens exceed the 32 positions of the model"):
        agreement(model, model, ids, new_tokens=21, device="cpu")
    for empty, new in ((ids[:0], 4), (ids[:, :0], 4), (ids, 0)):
        with pytest.raises(UsageError, match="agreement needs 1 each"):
            agreement(model, model, empty, new_tokens=new, device="cpu")
    with pytest.raises(UsageError, match=r"the reference .*eval\(\)"):
        agreement(model, tiny("opt").train(), ids, new_tokens=4, device="cpu")


def test_a_model_that_predicts_nothing_is_an_error():
    model = tiny("llama")
    model.model.norm.weight.data[:] = torch.nan
    for pair in ((model, tiny("llama")), (tiny("llama"), model)):
        with pytest.raises(NonFinite, match="a greedy text is not finite"):
            agreement(*pair, tokens(), new_tokens=4, device="cpu")
