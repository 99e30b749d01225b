"""A module whose packed matrices can be tuned: W~ is fixed, the vectors around it move.

    y = S_out Omega_m W~ Omega_n^T S_in x

For a while each packed matrix computes with W~ decoded once, and with S_in and S_out as float32
parameters, as are all other parameters of the module. Afterwards every tensor is of the type that
it was, with the values of the state that was chosen; if none was, each is the very tensor it was.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from quip.kernels.bits import unpack
from quip.packed.linear import QuantizedLinear, quantized_layers
from quip.transforms import Chain, Hadamard

TUNED: dict[type, tuple[str, ...]] = {Hadamard: ("signs_in", "signs_out")}  # of each transform


class Tunable:
    """What a packed matrix, or a stack, computes with while it is tuned."""

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        stored = layer.stored()
        decoder, chain = layer.spec.restore(stored, layer.out_features, layer.in_features)
        codes = unpack(layer.codes, decoder.index_bits, layer.in_features // decoder.dim)
        self.layer, self.W = layer, decoder.decode(codes).to(dtype)
        names = [name for link in chain.links for name in TUNED.get(type(link), ())]
        self.vectors = {name: nn.Parameter(stored[name].float()) for name in names}
        self._chain = Chain(tuple(self._tuned(link) for link in chain.links))

    def _tuned(self, link: Any) -> Any:
        """The link with parameters for its vectors."""
        return replace(link, **{name: self.vectors[name] for name in TUNED.get(type(link), ())})

    def product(
        self, x: Float[Tensor, "*batch n"], scales: Float[Tensor, " m"] | None = None
    ) -> Float[Tensor, "*batch m"]:
        """diag(scales) W_hat x, as `QuantizedLinear.product`; gradients reach the vectors."""
        x_t = self._chain.input(x.to(torch.promote_types(x.dtype, torch.float32)))
        y = self._chain.output(linear(x_t.to(self.W.dtype), self.W).to(x_t.dtype))
        return y if scales is None else y * scales


class MasterWeights:
    """A context in which a module computes in float32 and these of its parameters are tuned.

    Beside `trained`, the vectors of every packed matrix are. W~ is kept in `dtype`. A state is the
    tuned tensors as they would be stored: signs in float16, vectors in the type they came in, and
    matrices with the values of the narrowest type that held them, as a file does.
    """

    def __init__(
        self, module: nn.Module, trained: Iterable[nn.Parameter], *, dtype: torch.dtype
    ) -> None:
        # A rotation may gather all of |x| in one number, beyond the range of float16.
        dtype = torch.float32 if dtype == torch.float16 else dtype
        self._packed = [Tunable(layer, dtype) for layer in quantized_layers(module).values()]
        self._places = [(one.layer, name) for one in self._packed for name in one.vectors]
        self.signs = [vector for one in self._packed for vector in one.vectors.values()]
        self.others = list(dict.fromkeys(trained))
        self._old = {
            parameter: (parameter.data, parameter.requires_grad)
            for parameter in module.parameters()
            if parameter.is_floating_point()
        }
        self._kept: list[Tensor] | None = None

    @contextmanager
    def as_stored(self) -> Iterator[list[Tensor]]:
        """The state, with which the module computes inside the block."""
        parameters = [*self.signs, *self.others]
        types = [getattr(layer, name).dtype for layer, name in self._places]
        types += [_stored_as(self._old[parameter][0]) for parameter in self.others]
        exact = [parameter.data for parameter in parameters]
        state = [x.to(dtype, copy=True) for x, dtype in zip(exact, types, strict=True)]
        try:
            for parameter, x in zip(parameters, state, strict=True):
                parameter.data = x.to(parameter.dtype)
            yield state
        finally:
            for parameter, x in zip(parameters, exact, strict=True):
                parameter.data = x

    def keep(self, state: list[Tensor]) -> None:
        """Leave the module in this state."""
        self._kept = state

    def __enter__(self) -> "MasterWeights":
        for one in self._packed:
            one.layer.product = one.product  # type: ignore[method-assign]
        others = set(self.others)
        for parameter, (old, _) in self._old.items():
            wide = torch.promote_types(old.dtype, torch.float32)
            parameter.data = old.to(wide, copy=parameter in others)
            parameter.requires_grad_(parameter in others)
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._packed:
            vars(one.layer).pop("product", None)
        for parameter, (old, required) in self._old.items():
            parameter.grad = None
            parameter.data = old
            parameter.requires_grad_(required)
        if self._kept is not None:
            signs, others = self._kept[: len(self.signs)], self._kept[len(self.signs) :]
            for (layer, name), x in zip(self._places, signs, strict=True):
                setattr(layer, name, x)
            for parameter, x in zip(self.others, others, strict=True):
                parameter.data = x.to(self._old[parameter][0].dtype)


def _stored_as(x: Tensor) -> torch.dtype:
    if x.ndim == 1:
        return x.dtype
    halves = (torch.float16, torch.bfloat16)
    return next((half for half in halves if torch.equal(x.to(half).to(x.dtype), x)), x.dtype)
