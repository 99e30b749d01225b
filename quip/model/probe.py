"""What a module does with its weight, found by trying it on a few random numbers.

Two functions that agree on random numbers, of several sizes, are the same but for a chance of zero.
A class name, or the text of a forward, says less: FalconLinear is nn.Linear's product written out,
and other subclasses of the same look round their weight first.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

LARGEST = 1 << 20  # numbers in a parameter that is tried: scales have fewer


def is_product(module: nn.Module) -> bool:
    """Whether module(x) = x W^T + b, with nothing else to it: an nn.Linear, or one by another name.

    GPT-2's Conv1D is one that holds W^T. A module of a few numbers decides, whose weight and bias
    stand in for the real ones: once in float32, where a rounding of weights or activations shows,
    once in the dtype of the module.
    """
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, nn.Linear):
        return False
    held = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if not held <= {"weight", "bias"} or any(module.children()):
        return False
    return all(_multiplies(module, dtype) for dtype in {torch.float32, module.weight.dtype})


def _multiplies(module: nn.Linear, dtype: torch.dtype) -> bool:
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(5, 3, generator=rng).to(dtype)
    state = {"weight": W}
    if module.bias is not None:
        state["bias"] = torch.randn(5, generator=rng).to(dtype)
    # Small inputs and large ones, beyond the clamps of modules that clamp.
    sizes = torch.tensor([2.0**-8, 1, 2**8, 2**10])[:, None]
    x = (sizes * torch.randn(2, 4, 3, generator=rng)).to(dtype)
    wanted = linear(x, W, state.get("bias"))
    y = _tried(module, state, x)
    if y is None or y.shape != wanted.shape or y.dtype != wanted.dtype:
        return False
    # Sums of four terms in another order; each is rounded once or twice on the way.
    largest = linear(x.abs().double(), W.abs().double()) + 4
    return bool(
        ((y.double() - wanted.double()).abs() <= 8 * torch.finfo(dtype).eps * largest).all()
    )


def is_scale(module: nn.Module, name: str) -> bool:
    """Whether each number of a parameter matters only to the output in its own place.

    So it is with the scale of a norm, whatever its axes, and with no matrix: there, each number
    matters to a whole column of outputs.
    """
    parameter = module.get_parameter(name)
    if any(module.children()) or parameter.numel() > LARGEST:
        return False
    rng = torch.Generator().manual_seed(0)
    state = {
        other: torch.randn(held.shape, generator=rng) for other, held in module.named_parameters()
    }
    x = torch.randn(2, *parameter.shape, generator=rng)
    changed = torch.rand(parameter.shape, generator=rng) < 0.5
    before = _tried(module, state, x)
    after = _tried(module, state | {name: state[name] + changed}, x)
    if before is None or after is None or not before.shape == after.shape == x.shape:
        return False
    return torch.equal(before != after, changed.expand_as(x))


@torch.no_grad()
def _tried(module: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor | None:
    """What the module answers with these parameters; None where it cannot, or is no tensor."""
    try:
        y = functional_call(module, state, (x,))
    except Exception:  # a forward that takes something else may raise anything
        return None
    return y if isinstance(y, Tensor) else None
