"""What a model predicts is finite, or an error says where its activations stopped being so."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quip.errors import NonFinite, UnsupportedModel
from quip.model.matrices import find_blocks
from quip.packed.checks import is_finite

REMEDY = "evaluate with --dtype float32 or bfloat16, or quantize with more bits"


@contextmanager
def finite_predictions(model: nn.Module, what: str) -> Iterator[None]:
    """Every forward of the model inside the block predicts something at each position.

    Raises NonFinite, which names `what` was measured and the first block whose activations are NaN
    or infinite, at the first forward that does not. A logit of -inf excludes a token, and may be.
    """

    def check(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if not predicts(output.logits):
            hook.remove()  # the diagnosis runs the model once more
            refuse(module, what, *args, **kwargs)

    hook = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def predicts(logits: Float[Tensor, "*positions vocab"]) -> bool:
    """Whether the likeliest token of every position has a finite logit."""
    return bool(logits.detach().amax(-1).isfinite().all())


def refuse(model: nn.Module, what: str, /, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise NonFinite for `what`, after one forward on these inputs that finds where it began."""
    raise NonFinite(f"{what} is not finite: {_origin(model, args, kwargs)}; {REMEDY}")


def check_states(
    hidden: Float[Tensor, "count seqlen width"], what: str, where: str, dtype: torch.dtype
) -> None:
    """Raise NonFinite for `what` where hidden states, of a model in this dtype, are not finite."""
    if not is_finite(hidden):
        raise NonFinite(
            f"{what} is not finite: activations first become {_kind(hidden)} {where} ({dtype}); "
            f"{REMEDY}"
        )


@torch.no_grad()
def _origin(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Where activations first are NaN or infinite, in words."""
    try:
        prefix, blocks = find_blocks(model)
    except UnsupportedModel:
        return f"{type(model).__name__} predicts NaN or infinity"
    found: list[str] = []
    hooks = [
        hook
        for index, block in enumerate(blocks)
        for hook in (
            block.register_forward_pre_hook(
                partial(_see_entering, found, f"{prefix}.{index}"), with_kwargs=True
            ),
            block.register_forward_hook(partial(_see_leaving, found, f"{prefix}.{index}")),
        )
    ]
    try:
        logits = model(*args, **kwargs).logits
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"activations first become {found[0]} ({next(model.parameters()).dtype})"
    if not predicts(logits):
        return f"activations first become {_kind(logits)} after the last block of {prefix}"
    return "every activation is finite, but some token of the text is given no probability at all"


def _see_entering(
    found: list[str], name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    x = args[0] if args else kwargs.get("hidden_states")
    if not found and isinstance(x, Tensor) and not is_finite(x):
        found.append(f"{_kind(x)} before {name}")


def _see_leaving(
    found: list[str], name: str, _: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    x = output[0] if isinstance(output, tuple) else output
    if not found and isinstance(x, Tensor) and not is_finite(x):
        found.append(f"{_kind(x)} in {name}")


def _kind(x: Tensor) -> str:
    return "infinite" if bool(x.isinf().any()) else "NaN"
