"""The walk on blocks with odd habits: each is replayed exactly or refused with the reason."""

import pytest
import torch
from torch import Tensor, nn

from quip.errors import UnsupportedModel
from quip.model.walk import walk
from tests.support.tiny import VOCAB, tokens


class Toy(nn.Module):
    """A decoder of two-layer blocks whose habits the tests below vary."""

    def __init__(self, block: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([(block or ToyBlock)() for _ in range(3)])
        self.eval()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = x if extra is None else x + extra
        return x + self.second(self.first(x).relu())


def test_arguments_that_depend_on_the_tokens_are_replayed_batch_by_batch():
    class PerLayerInputs(Toy):
        def forward(self, input_ids, use_cache=False):
            x = self.embed(input_ids)
            for index, layer in enumerate(self.layers):
                x = layer(x, extra=self.embed(input_ids).roll(index, -1))
            return x

    model, ids = PerLayerInputs(), tokens()
    *_, last = walk(model, ids, device="cpu", batch_size=3)
    last.replay()
    with torch.no_grad():
        expected = torch.cat([model(part) for part in ids.split(3)])
    assert torch.equal(last.hidden, expected)


def test_models_that_are_no_plain_chain_of_blocks_are_refused():
    class ScaledBetween(Toy):
        def forward(self, input_ids, use_cache=False):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x) * 0.5
            return x

    class FedByEarlierOutput(Toy):
        def forward(self, input_ids, use_cache=False):
            first = x = self.layers[0](self.embed(input_ids))
            for layer in self.layers[1:]:
                x = layer(x, extra=first.tanh())
            return x

    class SharedState(Toy):
        def forward(self, input_ids, use_cache=False):
            x, state = self.embed(input_ids), {}
            for layer in self.layers:
                x = layer(x, extra=state)
            return x

    class SkipsOne(Toy):
        def forward(self, input_ids, use_cache=False):
            return self.layers[2](self.layers[0](self.embed(input_ids)))

    class StopsEarly(Toy):
        def forward(self, input_ids, use_cache=False):
            return self.layers[1](self.layers[0](self.embed(input_ids)))

    for model, reason in [
        (ScaledBetween(), "not called with the output of block 0"),
        (FedByEarlierOutput(), "computed from the output of an earlier block"),
        (SharedState(), "handed a dict"),
        (SkipsOne(), "block 2 is called out of turn"),
        (StopsEarly(), "only 2 of the 3 blocks"),
    ]:
        with pytest.raises(UnsupportedModel, match=reason):
            next(walk(model, tokens(), device="cpu"))


def test_a_matrix_that_never_runs_is_named():
    class Idle(ToyBlock):
        def forward(self, x, extra=None):
            return x + self.first(x) + x @ self.second.weight.T

    with pytest.raises(UnsupportedModel, match=r"layers\.0\.second never ran"):
        next(walk(Toy(Idle), tokens(), device="cpu")).observe()


@pytest.mark.parametrize("called", [True, False], ids=["called with nothing", "not called"])
def test_an_expert_of_a_list_that_no_token_reached_is_rounded_to_nearest(called, caplog):
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)}) for _ in range(2)
            )

        def forward(self, x, extra=None):
            for rows, expert in zip((x, x[:0]), self.experts, strict=True):
                if called or len(rows):
                    x = x + expert["down"](expert["up"](rows)).sum(0)
            return x

    block = next(walk(Toy(Mixture), tokens(), device="cpu"))
    found = {name.removeprefix("layers.0."): H for name, H in block.observe().items()}
    assert [found[f"experts.0.{name}"].count for name in ("up", "down")] == [84, 84]
    for name, n in (("up", 8), ("down", 6)):
        assert torch.equal(found[f"experts.1.{name}"].value(), (torch.eye(n) / n).double())
    assert "2 matrices of experts that no token reached" in caplog.text


def test_a_tensor_changed_in_place_between_two_matrices_is_not_shared():
    class InPlace(ToyBlock):
        def forward(self, x, extra=None):
            y = self.first(x)
            x.mul_(2)
            return y + self.second(x)

    model = Toy(InPlace)
    block = next(walk(model, tokens(), device="cpu"))
    entering = block.hidden.clone()
    first, second = block.observe().values()
    assert torch.equal(block.hidden, entering)
    torch.testing.assert_close(second.value(), 4 * first.value())


def test_inputs_that_part_after_the_first_call_are_refused():
    class Parting(ToyBlock):
        def forward(self, x, extra=None):
            return self.first(x) + self.second(x) + self.second(x + 1)

    with pytest.raises(UnsupportedModel, match=r"second shares its first input with .*first"):
        next(walk(Toy(Parting), tokens(), device="cpu")).observe()


def test_a_block_that_changes_the_dtype_of_its_inputs_is_refused():
    class Widening(ToyBlock):
        def forward(self, x, extra=None):
            return x.double()

    with pytest.raises(UnsupportedModel, match=r"layers\.0 turns .*float32 into .*float64"):
        list(walk(Toy(Widening), tokens(), device="cpu"))
