"""Tiny quantized models to tune, and what of them is no longer as it was."""

import torch
from torch import Tensor, nn

from quip.matrix.build import build_recipe
from quip.model.quantize import quantize_matrix_by_matrix
from quip.model.run import Run
from tests.support.tiny import tiny, tokens

LATTICE = build_recipe(quant="ldlq", codebook="E8P12")
DRAWN, FEW = tokens(48), tokens(16)


def short(name: str = "llama", **options) -> nn.Module:
    """A tiny model of two blocks."""
    model = tiny(name, **options)
    model.get_decoder().layers = model.get_decoder().layers[:2]
    model.config.num_hidden_layers = 2
    return model


def quantized(name: str = "llama", recipe=LATTICE, *, dtype=torch.float32, **options):
    """A tiny model, and the records of its matrices and of its tunings."""
    model = short(name, dtype=dtype)
    run = Run(recipe=recipe, **{"device": "cpu", "seed": 0, "batch_size": 8, **options})
    records = list(quantize_matrix_by_matrix(model, DRAWN, run))
    return model, records, run.tuned


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The names of tensors that are not bitwise as before."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    pairs = {name: (now[name], x) for name, x in before.items()}
    return {k for k, (x, y) in pairs.items() if x.dtype != y.dtype or not torch.equal(x, y)}
