"""An operation: its reference in torch, and faster forms of it that serve some arguments."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Form(Generic[R]):
    """One way to compute an operation. Both functions take the arguments of its reference."""

    compute: Callable[..., R]
    serves: Callable[..., bool]  # whether these arguments are ones that `compute` can take
    available: Callable[[], bool] = lambda: True  # on this machine: a compiler, a device


class Operation(Generic[P, R]):
    """Calls the first form that serves the arguments and is available, otherwise the reference.

    `forms` stand in order of preference, by the name of what they are made for or with:

        multiply = Operation(reference.multiply, triton=triton.FORM, cpu=cpu.FORM)

    All forms compute what the reference does, up to the noise of its dtype (tests/kernels/
    test_forms.py), so that which of them is taken is a matter of speed alone.
    """

    def __init__(self, reference: Callable[P, R], **forms: Form[R]) -> None:
        self.reference, self.forms = reference, forms

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.chosen(*args, **kwargs)(*args, **kwargs)

    def chosen(self, *args: P.args, **kwargs: P.kwargs) -> Callable[..., R]:
        """What a call with these arguments is computed by."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return self.reference  # under vmap or jacrev tensors stand for others, without memory
        for form in self.forms.values():
            if form.serves(*args, **kwargs) and form.available():
                return form.compute
        return self.reference


def learns(*parts: Tensor | None) -> bool:
    """Whether a gradient is to reach one of them, which only a reference passes on."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parts)
