"""A block beside the one that it was: what its outputs lack, and which write to the stream."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from quip.matrix.hessian import Hessian
from quip.matrix.paired import Paired
from quip.model.lacking import Lacking
from quip.model.states import States
from quip.model.team import ALONE, Team
from quip.model.twin import Twin
from quip.model.walk import walk
from quip.packed.experts import unfuse
from tests.support.mixtures import mixture
from tests.support.processes import in_team
from tests.support.tiny import SEQLEN, tiny, tokens

BATCH = 3
WRITERS = {
    "opt": {"out_proj", "fc2"},
    "opt-post-norm": {"out_proj"},  # the MLP adds to what a norm made of the stream
    "llama": {"o_proj", "down_proj"},
    "gemma2": set(),  # a norm stands between
    "gpt-neox": {"dense", "dense_4h_to_h"},
    "phi": {"dense", "fc2"},  # side by side
    "bloom": {"dense", "dense_4h_to_h"},
    "gptj": {"out_proj", "fc_out"},
}


def first(model: nn.Module, team: Team = ALONE, windows: Tensor | None = None) -> Twin:
    """The first block of a paired walk, which inputs have reached that are wrong already."""
    ids = tokens() if windows is None else windows
    own = team.share(ids, BATCH)
    block = next(walk(model, own, device="cpu", batch_size=BATCH, paired=True, team=team))
    rng = torch.Generator().manual_seed(2)
    noise = 0.2 * torch.randn(len(ids), *block.hidden.shape[1:], generator=rng)
    block.hidden.add_(team.share(noise, BATCH))
    assert isinstance(block, Twin)
    return block


def last(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_to_the_residual_stream_is_found(name):
    block = first(tiny(name))
    found = set()
    for names in block.groups():
        with torch.no_grad():
            seen = block._see(block.module, block.run, names, 0, None)
        assert seen.is_whole(names, (BATCH, SEQLEN))
        found |= {last(one) for one in seen.sums}
    assert found == WRITERS[name]


def test_groups_are_those_that_one_observation_finds():
    block = first(tiny("phi"))
    shared: dict[int, list[str]] = {}
    for name, hessian in block.observe().items():
        shared.setdefault(id(hessian), []).append(name)
    assert block.groups() == list(shared.values())


def streams(block: Twin, module: nn.Module, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By the last part of its name, what enters a matrix of llama, and what comes of it there."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    stream = {"o_proj": hidden}
    hooks = [
        module.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: stream.update(down_proj=args[0])
        )
    ]
    for name, one in module.named_modules():
        if isinstance(one, nn.Linear):
            key = last(name)
            hooks.append(
                one.register_forward_hook(
                    lambda _, args, y, key=key: seen.update({key: (args[0], y)})
                )
            )
    states: States = block._states
    call = states.calls(block.index)[0]
    call.run(module, hidden.clone(), call.on(torch.device("cpu"), {}))
    for hook in hooks:
        hook.remove()
    found = {key: (x, y + stream.get(key, 0)) for key, (x, y) in seen.items()}
    return {key: (x.double(), y.double()) for key, (x, y) in found.items()}


@torch.no_grad()
def test_what_outputs_lack_is_the_difference_of_both_streams():
    """C = W (G - H) + R, once matrices before it have changed; H is that of the present inputs."""
    model = tiny("llama")
    block = first(model, windows=tokens(BATCH))  # one batch, so that one call is enough
    original = deepcopy(block.module)
    q = block.module.self_attn.q_proj
    changed = nn.Linear(32, 32, bias=False)
    changed.weight = nn.Parameter(q.weight + 0.1)
    block.module.self_attn.q_proj = changed
    then = streams(block, original, block._states.original)
    now = streams(block, block.module, block.hidden)
    for names in block.groups()[1:]:
        (found,) = block.observe_lacking(names, frozenset({1}))
        sums = found[names[0]]
        assert isinstance(sums, Paired)
        assert {id(one) for one in found.values()} == {id(sums)}
        for part, rows in ((sums, slice(None)), (sums.held, slice(1, 2))):
            lack = part.lack()
            for name in names:
                x = now[last(name)][0][rows].flatten(0, 1)
                e = (then[last(name)][1] - now[last(name)][1])[rows].flatten(0, 1)
                assert e.abs().max() > 0.1
                for value, expected in ((lack.C[name], e.T @ x), (lack.H, x.T @ x)):
                    expected = expected / len(x)
                    error = (value.double() - expected).abs().max()
                    assert error < 1e-5 * expected.abs().max()


def test_a_block_that_nothing_has_changed_lacks_nothing_and_replays_alike():
    block = next(walk(tiny("llama"), tokens(), device="cpu", batch_size=BATCH, paired=True))
    plain = block.observe()
    for names in block.groups():
        (found,) = block.observe_lacking(names)
        sums = found[names[0]]
        lack = sums.lack()
        assert not any(C.any() for C in lack.C.values())
        torch.testing.assert_close(sums.value(), plain[names[0]].value(), rtol=1e-6, atol=1e-6)
    block.replay()
    assert torch.equal(block.hidden, block._states.original)


def test_experts_are_observed_without_what_they_lack_and_others_with_it():
    model = mixture("qwen2-moe")  # which has a shared expert too
    unfuse(model)
    block = first(model)
    for names in block.groups():
        (found,) = block.observe_lacking(names)
        routed = ".experts." in names[0]
        assert {isinstance(one, Paired) for one in found.values()} == {not routed}
        assert all(isinstance(one.summed(), Hessian) for one in found.values())


def sums_of(team: Team) -> dict[str, list[Tensor]]:
    """The sums of each group, added up over the team, at its first process."""
    block, found = first(tiny("llama"), team), {}
    held = [1, 4]
    own = team.share(torch.arange(7), BATCH).tolist()
    for names in block.groups():
        (seen,) = block.observe_lacking(names, frozenset(own.index(i) for i in held if i in own))
        sums = seen[names[0]]
        team.total(sums, 0)
        if team.leads:
            lacks = sums.lack(), sums.held.lack()
            found[names[0]] = [x for lack in lacks for x in (lack.H, *lack.C.values())]
    return found


def test_any_number_of_processes_sums_up_the_same_bits():
    expected = sums_of(ALONE)
    found = in_team(2, sums_of)[0]
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(found[name], parts, strict=True))


def test_sums_that_outgrow_the_first_batch_are_taken_again(monkeypatch):
    """Of the first windows next to nothing is wrong: anchors of theirs are too small for others."""
    joined, real = [], Lacking.join
    monkeypatch.setattr(Lacking, "join", lambda own: (joined.append(own), real(own))[1])
    block = first(tiny("llama"))
    right = block._states.original[:BATCH]
    block.hidden[:BATCH] = right + 1e-6 * (block.hidden[:BATCH] - right)
    names = block.groups()[1]
    found = []
    for team in (ALONE, Team(exact=False)):
        block._states.team = team
        (seen,) = block.observe_lacking(names)
        found.append(seen[names[0]].lack().C[names[0]])
    assert len(joined) == 3  # the first time twice
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6 * float(found[1].abs().max()))


def test_batches_that_do_not_fit_are_halved():
    model = tiny("llama")

    def hook(_, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    block = first(model, windows=tokens(6))
    names = block.groups()[-1]
    (expected,) = block.observe_lacking(names, frozenset({5}))
    for module in (block.module, block._original):
        module.mlp.down_proj.register_forward_pre_hook(hook)
    (found,) = block.observe_lacking(names, frozenset({5}))
    assert block.batch_size == 1
    one, other = found[names[0]], expected[names[0]]
    for part, wanted in ((one, other), (one.held, other.held)):
        C, D = part.lack().C[names[0]], wanted.lack().C[names[0]]
        torch.testing.assert_close(C, D, rtol=1e-4, atol=1e-4 * float(D.abs().max()))
