"""Mixtures of experts, each matrix of each expert a module of its own.

transformers holds the matrices of all experts of a layer in two parameters of three axes, of which
no single matrix can be replaced. `Experts` stands in place of such a module, has the same call and
computes what transformers' `eager` does, number for number:

    y_t = sum over the experts e of token t, in order:  w_te down_e(gate(gate_up_e(x_t)))

Tokens are grouped by expert. Only experts that have some run, once each, so a packed matrix is
decoded once whatever the number of its tokens, and one without tokens not at all.
"""

from collections.abc import Callable, Iterator
from copy import copy
from itertools import pairwise, product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from quip.errors import UnsupportedModel
from quip.packed import ops
from quip.packed.linear import TwoStepLinear

MARKS = ("has_gate", "has_bias", "is_transposed")  # of transformers' decorator; not of Llama 4
MOST = 1 << 16  # experts of a model, in all layers; half a minute to take apart, and there is none


class Expert(nn.ModuleDict):
    """The matrices of one expert: gate_up_proj (up_proj where there is no gate) and down_proj.

    `Experts` calls them, which knows what happens between the two.
    """


class Experts(nn.Module):
    """The experts of a layer, as children "0", "1", ..., in place of transformers' fused module.

    Made of one, their nn.Linear modules hold views of its parameters: nothing is copied, also on
    the meta device. Other children, such as an activation, are those of the fused module.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.transposed = bool(getattr(fused, "is_transposed", True))
        self.has_norm = bool(getattr(fused, "has_post_expert_norm", False))
        self._count = len(fused.get_parameter("down_proj"))
        for name, child in fused.named_children():
            self.add_module(name, child)
        # What is left of it knows the activation. In a tuple: no module of this one.
        self._shell: tuple[Any, ...] = (_without_parameters(fused),)
        self.has_gate = hasattr(fused, "gate_up_proj")
        for index in range(len(self)):
            matrices = {name: self._view(fused, name, index) for name in _names(fused)}
            self.add_module(str(index), Expert(matrices))
        self.train(fused.training)
        self.number = ops.number(self)
        self.register_load_state_dict_post_hook(lay_out)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        """The `Expert` of this number."""
        return self._modules[str(index)]

    def forward(self, *called_with: Tensor) -> Tensor:
        """What `mix` answers; while a graph is made, as one operator of it."""
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return ops.experts(called_with, self.number)
        return self.mix(*called_with)

    def mix(
        self,
        hidden: Float[Tensor, "tokens h"],
        index: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens h"]:
        """The weighted sum of what the k experts of each token make of it."""
        answer = torch.zeros_like(hidden)
        for expert, rows, slots in self.active(index):
            y = self[expert].down_proj(self.between(expert, hidden[rows]))
            y = self._shell[0].post_expert_norm(y) if self.has_norm else y
            y = y * weights[rows, slots, None]
            answer.index_add_(0, rows, y.to(answer.dtype))
        return answer

    def routed(self, *called_with: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, experts and weights of the tokens, of what the module is called with."""
        hidden, index, weights = called_with
        return hidden, index, weights

    def between(self, expert: int, x: Float[Tensor, "t h"]) -> Float[Tensor, "t f"]:
        """What enters the down_proj of this expert for inputs x."""
        own, shell = self[expert], self._shell[0]
        if not self.has_gate:
            return shell.act_fn(own.up_proj(x))
        gate_up = own.gate_up_proj(x)
        if hasattr(shell, "_apply_gate"):
            return shell._apply_gate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return up * shell.act_fn(gate)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = ops.number(self)  # a copy has its own

    def active(
        self, index: Int[Tensor, "tokens k"]
    ) -> Iterator[tuple[int, Int[Tensor, " t"], Int[Tensor, " t"]]]:
        """Each expert that has tokens, in order, with their rows and their slots among the k.

        Tokens come slot by slot, as transformers has them: sums in other orders differ.
        """
        tokens = len(index)
        experts, order = index.T.flatten().sort(stable=True)
        bounds = torch.arange(len(self) + 1, device=index.device)
        ends = torch.searchsorted(experts, bounds.to(experts.dtype)).tolist()
        for expert, (start, end) in enumerate(pairwise(ends)):
            if start < end:
                places = order[start:end]
                yield expert, places % tokens, places // tokens

    def fused(self) -> nn.Module:
        """The module of transformers that this one stands for, with the matrices of its experts.

        They must be dense. Its parameters are copies, and the experts are left without theirs one
        after the other, so that both are never held.
        """
        module = _without_parameters(self._shell[0])
        for name, kind in product(_names(self[0]), ("weight", "bias")):
            matrices = [self[i][name] for i in range(len(self))]
            held = [getattr(matrix, kind) for matrix in matrices]
            if held[0] is not None:
                flip = self.transposed and kind == "weight"
                whole = torch.stack([x.detach().T if flip else x.detach() for x in held])
                called = name if kind == "weight" else f"{name}_bias"
                module.register_parameter(called, nn.Parameter(whole, held[0].requires_grad))
                for matrix in matrices:
                    delattr(matrix, kind)
        return module.train(self.training)

    def _view(self, fused: nn.Module, name: str, index: int) -> nn.Linear:
        whole = fused.get_parameter(name)
        W = whole.detach()[index]
        W = W.T if self.transposed else W
        bias = getattr(fused, f"{name}_bias", None)
        kind = nn.Linear if bias is None else TwoStepLinear
        module = kind(W.shape[1], W.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(W, requires_grad=whole.requires_grad)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach()[index], requires_grad=bias.requires_grad)
        return module


class ScaledExperts(Experts):
    """The experts of Llama 4, which are handed each token once an expert, scaled by its score.

    Scores of experts that the router did not choose are zero, and so is what these experts make of
    a zero: such rows are left out.
    """

    def mix(  # type: ignore[override]
        self, scaled: Float[Tensor, "all h"]
    ) -> Float[Tensor, "all h"]:
        """What each expert makes of its rows; there are as many for each, in order of experts."""
        rows = self._rows(scaled)
        answer = torch.zeros_like(scaled)
        answer[rows] = super().mix(*self.routed(scaled))
        return answer

    def routed(self, *called_with: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (scaled,) = called_with
        rows = self._rows(scaled)
        index = (rows // (len(scaled) // len(self)))[:, None]
        return scaled[rows], index, torch.ones_like(index, dtype=scaled.dtype)

    def _rows(self, scaled: Tensor) -> Tensor:
        return scaled.any(dim=-1).nonzero().flatten()


def unfuse(model: nn.Module) -> None:
    """Put `Experts` in place of every fused experts module of a model, or of a part of one.

    Modules that hold anything else, or under other names, stay as they are. Raises
    UnsupportedModel for a model of more experts than any has.
    """
    fused = [module for module in model.modules() if is_fused(module)]
    if (count := sum(len(x.get_parameter("down_proj")) for x in fused)) > MOST:
        raise UnsupportedModel(
            f"its layers have {count} experts together, and models of up to {MOST} are read; "
            "give another model"
        )
    _each(model, is_fused, lambda x: (ScaledExperts if _is_llama_4(x) else Experts)(x))


def fuse(model: nn.Module) -> None:
    """Put transformers' own module in place of all `Experts` whose every matrix is dense."""
    _each(model, _is_dense, lambda module: module.fused())


def is_fused(module: nn.Module) -> bool:
    """Whether `Experts` can stand in place of this module, with the same call."""
    marked = _is_llama_4(module) or all(hasattr(module, x) for x in MARKS)
    if isinstance(module, Experts) or not marked:
        return False
    biased = bool(getattr(module, "has_bias", False))
    wanted = dict.fromkeys(_names(module), 3)
    wanted |= {f"{name}_bias": 2 for name in wanted} if biased else {}
    held = {name: x.ndim for name, x in module.named_parameters(recurse=False)}
    return held == wanted and not any(True for _ in module.buffers(recurse=False))


def lay_out(experts: Experts, *_: object) -> None:
    """Hold dense matrices column after column where transformers does, whatever they came from.

    In files each is held row after row, and products of the two differ in their last digits.
    """
    for matrix in experts.modules() if experts.transposed else ():
        if isinstance(matrix, nn.Linear) and not matrix.weight.is_meta:
            matrix.weight.data = matrix.weight.data.T.contiguous().T


def _is_llama_4(module: nn.Module) -> bool:
    return type(module).__name__ == "Llama4TextExperts"


def _names(module: nn.Module) -> tuple[str, str]:
    """The names of the two matrices, of a fused module or of an expert."""
    return ("gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"), "down_proj"


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, Experts) and all(
        isinstance(matrix, nn.Linear) for i in range(len(module)) for matrix in module[i].values()
    )


def _without_parameters(fused: nn.Module) -> nn.Module:
    shell = copy(fused)
    vars(shell)["_parameters"] = {}
    return shell


def _each(
    model: nn.Module, chosen: Callable[[nn.Module], bool], made: Callable[[Any], nn.Module]
) -> None:
    for name in [name for name, module in model.named_modules() if chosen(module)]:
        model.set_submodule(name, made(model.get_submodule(name)), strict=True)
