"""Modules are told apart by what they compute, not by what they are called."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.pytorch_utils import Conv1D

from quip.model.probe import is_product, is_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_product_by_another_name_is_one(device, bias, dtype):
    for kind in (nn.Linear, FalconLinear):
        assert is_product(kind(6, 4, bias=bias, device=device, dtype=dtype))


class Ternary(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.sign(), self.bias)


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x.bfloat16().float(), self.weight, self.bias)


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x.clamp(-500, 500), self.weight, self.bias)


class Widened(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x.float(), self.weight.float(), self.bias.float())


class Adapted(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.more = nn.Parameter(torch.zeros(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) + self.more


class Other(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) * scale


@pytest.mark.parametrize("kind", [Ternary, Rounded, Clamped, Widened, Adapted, Other])
def test_what_computes_anything_else_is_no_product(kind):
    assert not is_product(kind(6, 4, dtype=torch.bfloat16))


def test_a_module_of_another_kind_is_no_product_but_for_gpt2s_conv1d():
    assert is_product(Conv1D(4, 4))
    assert not is_product(nn.Conv1d(4, 4, 1))
    assert not is_product(nn.Identity())


def test_scales_of_norms_are_scales_whatever_their_axes():
    for norm in (
        CohereLayerNorm(hidden_size=(4, 8)),
        GemmaRMSNorm((4, 8)),
        nn.LayerNorm((4, 8)),
        nn.RMSNorm((4, 8)),
    ):
        assert norm.weight.shape == (4, 8)
        assert is_scale(norm, "weight")


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def test_matrices_are_no_scales_even_where_they_are_square():
    for module in (Router(), Conv1D(6, 6), nn.Linear(6, 6), nn.Embedding(6, 6), nn.Conv1d(6, 6, 1)):
        assert not is_scale(module, "weight")
