"""What is one operator of torch for torch.compile: the product of a packed matrix, and experts.

Compiled code calls it with the tensors that a matrix is stored in and the words that say what they
mean; there it runs the code of a layer that is called by itself. With a form that knows shapes
only, and a gradient, nothing of it breaks a graph. Which experts run depends on the tokens, so all
of a layer are one operator too, without a gradient.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from quip.packed.parts import MADE, Parts, parts_of
from quip.packed.spec import Spec

LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
NUMBERS = count()
ARGUMENTS = "Tensor[] stored, str spec, int[] sizes, int index"
ALL = -1  # in place of the index of a member: every one, one after the other


@torch.library.custom_op(
    "quip::product", mutates_args=(), schema=f"(Tensor x, {ARGUMENTS}) -> Tensor"
)
def product(
    x: Tensor, stored: Sequence[Tensor], spec: str, sizes: Sequence[int], index: int
) -> Tensor:
    """W_hat_i x in the dtype of x: member `index` of a stack of matrices of so many rows, or ALL.

    `stored` are the tensors of the whole in the order of `Spec.empty`, then the scales of a stack;
    `spec` is the specification as JSON. A matrix that is no stack has one size. The members of a
    stack that are asked the same in turn share one product.
    """
    parts, codes = _parts(stored, spec, sizes, x.shape[-1], x), stored[0]

    def compute(x: Tensor) -> Tensor:
        return parts.multiply(x, codes).to(x.dtype)

    def compute_each(x: Tensor) -> Sequence[Tensor]:
        return compute(x).split(list(sizes), dim=-1)

    alone = index == ALL or len(sizes) == 1
    y = compute(x) if alone else parts.answers.ask(x, index, compute_each)
    return y.contiguous()


@product.register_fake
def _shaped(
    x: Tensor, stored: Sequence[Tensor], spec: str, sizes: Sequence[int], index: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(sizes) if index == ALL else sizes[index])


@torch.library.custom_op(
    "quip::product_backward",
    mutates_args=(),
    schema=f"(Tensor g, {ARGUMENTS}, SymInt n) -> Tensor",
)
def product_backward(
    g: Tensor, stored: Sequence[Tensor], spec: str, sizes: Sequence[int], index: int, n: int
) -> Tensor:
    """W_hat_i^T g in the dtype of g: the gradient of the n inputs of `product`."""
    parts = _parts(stored, spec, sizes, n, g)
    wide = torch.promote_types(g.dtype, torch.float32)
    W = parts.dense(stored[0], n, wide)
    if parts.scales is not None:
        W *= parts.scales[:, None]
    return g @ (W if index == ALL else W.split(list(sizes))[index]).to(g.dtype)


@product_backward.register_fake
def _shaped_backward(
    g: Tensor, stored: Sequence[Tensor], spec: str, sizes: Sequence[int], index: int, n: int
) -> Tensor:
    return g.new_empty(*g.shape[:-1], n)


@torch.library.custom_op(
    "quip::rows",
    mutates_args=(),
    schema="(Tensor ids, Tensor[] stored, str spec, int n, Tensor like) -> Tensor",
)
def rows(ids: Tensor, stored: Sequence[Tensor], spec: str, n: int, like: Tensor) -> Tensor:
    """Rows of a packed embedding by their numbers, n columns each, in the dtype of `like`."""
    parts = _parts(stored, spec, [len(stored[0])], n, like)
    return parts.rows(ids, stored[0], n).to(like.dtype)


@rows.register_fake
def _shaped_rows(ids: Tensor, stored: Sequence[Tensor], spec: str, n: int, like: Tensor) -> Tensor:
    return like.new_empty(*ids.shape, n)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stored, *ctx.rest = inputs
    ctx.n = x.shape[-1]
    ctx.save_for_backward(*stored)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    stored = list(ctx.saved_tensors)
    gradient = product_backward(g, stored, *ctx.rest, ctx.n)
    return gradient, [None] * len(stored), None, None, None


product.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op(
    "quip::experts", mutates_args=(), schema="(Tensor[] called_with, int number) -> Tensor"
)
def experts(called_with: Sequence[Tensor], number: int) -> Tensor:
    """What the experts of this number (`number`) make of what they are called with."""
    return LAYERS[number].mix(*called_with)


@experts.register_fake
def _like_hidden(called_with: Sequence[Tensor], number: int) -> Tensor:
    return torch.empty_like(called_with[0])


def number(layer: Any) -> int:
    """A number by which `experts` finds this layer, for as long as it lives."""
    LAYERS[found := next(NUMBERS)] = layer
    return found


def _parts(
    stored: Sequence[Tensor], words: str, sizes: Sequence[int], n: int, like: Tensor
) -> Parts:
    """What n x m matrices of these tensors are computed with, in the dtype and place of `like`."""
    spec = _spec(words)
    names = (*_names(words, sum(sizes), n), "scales")  # those of a stack come last
    named = dict(zip(names, stored, strict=False))
    made = MADE.get(named["codes"])
    if like.is_cuda and not (made is not None and made.ready and made.fit(named)):
        with ThreadPoolExecutor(1) as apart:
            return apart.submit(make_apart, named, spec, sizes, n, like).result()
    return parts_of(named, spec, sizes, n)


def make_apart(
    stored: Mapping[str, Tensor], spec: Spec, sizes: Sequence[int], n: int, like: Tensor
) -> Parts:
    """Parts, and all that a first product keeps for later ones: made in a thread of its own.

    What compiled code allocates may lie in the memory of a CUDA graph, which is used anew when its
    call has ended. That holds for the thread that runs it, and for no other.
    """
    device = like.device
    with torch.no_grad(), torch.cuda.device(device) if like.is_cuda else nullcontext():
        if like.is_cuda:  # the tensors may still be written by the stream of the other thread
            torch.cuda.synchronize(device)
        parts = parts_of(stored, spec, sizes, n)
        parts.multiply(torch.zeros(1, n, dtype=like.dtype, device=device), stored["codes"])
        if like.is_cuda:
            torch.cuda.synchronize(device)
    parts.ready = True
    return parts


@cache
def _spec(words: str) -> Spec:
    found = json.loads(words)
    return Spec(found["codebook"], tuple(found["transforms"]))


@cache
def _names(words: str, m: int, n: int) -> tuple[str, ...]:
    """The stored tensors of an m x n matrix in their order."""
    return tuple(_spec(words).empty(m, n))
