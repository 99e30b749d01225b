"""A layer of vLLM whose matrices are packed.

vLLM hands over the tensors of a file one by one, under the name that they have there and with the
part of the layer that they are of (`q`, or 0 for gate). A layer has a slot, a parameter without
numbers, for each name that may come, and puts what comes into the matrix that it is of.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from quip.errors import QuipError, Unavailable, UnsupportedModel
from quip.packed import ops
from quip.packed.cut import Cut
from quip.packed.files import DAMAGED
from quip.packed.linear import QuantizedLinear
from quip.packed.spec import Spec
from quip.packed.stack import Stack
from quip.serve.vllm.products import Product, in_order, rows
from quip.serve.vllm.shares import cut_of, shares

PLACES: dict[str | int | None, int] = {None: 0, "q": 0, "k": 1, "v": 2}
Take = Callable[..., None]


class QuipLinear(LinearMethodBase):
    """W_hat x + b by the packed matrices of a layer: by one product where they are one stack."""

    def __init__(self, name: str, found: list[Product], check: Callable[[], None]) -> None:
        """`check` is called once all layers of the model are made."""
        self.name, self.products, self.check = name, found, check

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer empty matrices, and slots for what the files hold of them.

        Raises UnsupportedModel where several devices would share out what cannot be cut apart.
        """
        parts = shares(layer, output_partition_sizes, output_size)
        sizes = rows(self.name, [part.whole for part in parts], self.products)
        packed, self.cuts = [], list[Cut | None]()
        for product in self.products:
            packed.append(_empty(product, input_size, [sizes[i] for i in product.places]))
            inside = [parts[i] for i in product.places] if len(sizes) == len(parts) else parts
            self.cuts.append(cut_of(layer, inside, input_size_per_partition, input_size))
            self._check_cut(self.cuts[-1], product.spec)
        layer.packed = nn.ModuleList(packed)
        layer.order = in_order(self.products, output_partition_sizes)
        _open_slots(layer, self.name, self.products, on_host=any(self.cuts))

    def _check_cut(self, cut: Cut | None, spec: Spec) -> None:
        try:
            if cut is not None:
                cut.check(spec)
        except UnsupportedModel as error:
            raise UnsupportedModel(
                f"{self.name}: {error}, or give --tensor-parallel-size 1"
            ) from error

    def process_weights_after_loading(self, layer: Any) -> None:
        """Close the slots. Raises Unavailable where a tensor never came, or tensors make none."""
        self.check()
        device = layer.weight.device
        for slot in [name for name, x in layer._parameters.items() if hasattr(x, "of_quip")]:
            delattr(layer, slot)
        if hasattr(layer, "stack"):
            del layer.stack
        for i, (matrix, cut) in enumerate(zip(layer.packed, self.cuts, strict=True)):
            if missing := [name for name, x in matrix.stored().items() if x.is_meta]:
                raise Unavailable(
                    f"{self.name}: its files hold no {missing[0]} of a matrix; {DAMAGED}"
                )
            try:
                matrix = matrix.to(device) if cut is None else cut.of(matrix, device)
                matrix.check()
            except QuipError as error:
                raise Unavailable(f"{self.name}: {error}; {DAMAGED}") from error
            layer.packed[i] = matrix

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        answers = [matrix.traced(x, ops.ALL) for matrix in layer.packed]
        y = answers[0] if len(answers) == 1 else torch.cat(answers, dim=-1)
        if layer.order is not None:
            y = torch.cat([y[..., part] for part in layer.order], dim=-1)
        return y if bias is None else y + bias


def _empty(product: Product, n: int, sizes: list[int]) -> QuantizedLinear:
    """A matrix, or a stack, of n inputs on the meta device."""
    if len(sizes) > 1:
        return Stack(n, sizes, spec=product.spec, device="meta")
    return QuantizedLinear(n, sizes[0], bias=False, spec=product.spec, device="meta")


def _open_slots(layer: Any, name: str, found: list[Product], *, on_host: bool) -> None:
    """Slots of the layer for the tensors of single matrices, and of `stack` for those of stacks.

    What is to be cut is read `on_host`: on a device there may be room for its part alone.
    """
    for module, stacked in ((layer, False), (nn.Module(), True)):
        here = {
            product.places[0]: matrix
            for product, matrix in zip(found, layer.packed, strict=True)
            if isinstance(matrix, Stack) == stacked
        }
        for matrix in here.values():
            for key, tensor in matrix.stored().items():
                _open(module, key, tensor.dtype, partial(_take, name, here, key, on_host))
        if stacked and here:
            layer.stack = module
    # The guard of a file: no reader needs it.
    _open(layer, "weight", torch.float16, partial(_refuse_weight, name))


def _open(module: nn.Module, key: str, dtype: torch.dtype, take: Take) -> None:
    slot: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    slot.weight_loader, slot.of_quip = take, True
    module.register_parameter(key, slot)


def _take(
    name: str,
    here: dict[int, QuantizedLinear],
    key: str,
    on_host: bool,
    slot: nn.Parameter,
    tensor: Tensor,
    part: str | int | None = None,
) -> None:
    """Put a tensor of a file where it belongs. Raises Unavailable where it does not fit."""
    matrix = here.get(part if isinstance(part, int) else PLACES.get(part, -1))
    room = matrix.stored().get(key) if matrix else None
    there = f"{tensor.dtype} {list(tensor.shape)}"
    wanted = "nothing" if room is None else f"{room.dtype} {list(room.shape)}"
    if matrix is None or there != wanted:
        raise Unavailable(
            f"{name}.{key}: config.json asks for {wanted}, and the files hold {there}; {DAMAGED}"
        )
    device = torch.device("cpu") if on_host else slot.device
    setattr(matrix, key, tensor.to(device, copy=True))  # a file's may lie in its pages


def _refuse_weight(name: str, slot: nn.Parameter, tensor: Tensor, part: Any = None) -> None:
    if tensor.numel():
        raise Unavailable(f"{name}: packed by its config.json, and dense in its files; {DAMAGED}")
