"""Independent oracles of what a loss feels, in float64, from the formulas alone.

One window at a time through the whole model, with autograd as it is: each matrix's output y gets
zeros e added, so that e.grad is the gradient of the loss there. Nothing of the package is imported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Gradient:
    """What one call of a matrix was handed, and the gradient of the loss at what it answered."""

    x: Float[Tensor, "rows n"]
    g: Float[Tensor, "rows m"]


@contextmanager
def probed(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Inside, x and e of each call of the modules."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def probe(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            e = torch.zeros_like(y, requires_grad=True)
            found[name].append((args[0].detach().flatten(0, -2), e))
            return y + e

        return hook

    hooks = [module.register_forward_hook(probe(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def gradients(
    model: nn.Module, modules: dict[str, nn.Module], ids: Int[Tensor, " seqlen"], labels: Tensor
) -> dict[str, list[Gradient]]:
    """Of the sum over the positions but the last of -log p(label), for each call of a matrix."""
    with probed(modules) as found:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        cross_entropy(logits, labels, reduction="sum").backward()
    return {
        name: [
            Gradient(x, torch.zeros(0) if e.grad is None else e.grad.flatten(0, -2))
            for x, e in calls
        ]
        for name, calls in found.items()
    }


def rescale_outputs(W: Float64[Tensor, "m n"], f: Float64[Tensor, " m"]) -> Float64[Tensor, " m"]:
    """r_i = (|W_i|^2 / f_i)^(1/4), with 0.01 mean f added to f."""
    f = f + 0.01 * f.mean()
    return (W.square().sum(1) / f) ** 0.25


def rescale_factor(W: Float64[Tensor, "m n"], f: Float64[Tensor, " m"]) -> float:
    """(sum_i sqrt(f_i) |W_i|)^2 / (sum f_i sum |W_i|^2): what is left of the damage."""
    sizes = W.square().sum(1)
    return float((f * sizes).sqrt().sum() ** 2 / (f.sum() * sizes.sum()))
