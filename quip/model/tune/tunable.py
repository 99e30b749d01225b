"""A module whose packed matrices can be tuned: codes stay, what is around them moves.

    y = S_out Omega_m W~ Omega_n^T S_in x

For a while each packed matrix computes with S_in, S_out and what its decoder learns (centroids; of
a trellis scales and tables) as float32 parameters, as are all other parameters of the module; the
W~ of a lattice or a grid is fixed, and decoded once. Afterwards every tensor is of the type that it
was, with the values of the state that was chosen; if none was, each is the very tensor it was.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from quip.codebooks import Decoder
from quip.kernels.bits import unpack
from quip.packed.linear import QuantizedLinear, quantized_layers
from quip.transforms import Chain, Hadamard

TUNED: dict[type, tuple[str, ...]] = {Hadamard: ("signs_in", "signs_out")}  # of each transform


def learns(module: nn.Module) -> bool:
    """Whether the decoder of a packed matrix of the module has something to learn."""
    layers = quantized_layers(module).values()
    return any(_restored(layer)[0].learnable() for layer in layers)


def _restored(layer: QuantizedLinear) -> tuple[Decoder, Chain]:
    return layer.spec.restore(layer.stored(), layer.out_features, layer.in_features)


class Tunable:
    """What a packed matrix, or a stack, computes with while it is tuned.

    It holds W~; where the decoder has something to learn, the codes instead, of which each product
    decodes W~ anew, and gradients keep that until they have reached the centroids.
    """

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        stored, (decoder, chain) = layer.stored(), _restored(layer)
        codes = unpack(layer.codes, decoder.index_bits, layer.in_features // decoder.dim)
        self.layer, self._decoder, self._dtype = layer, decoder, dtype
        self._scales = layer.row_scales
        names = [name for link in chain.links for name in TUNED.get(type(link), ())]
        self.vectors = {name: nn.Parameter(stored[name].float()) for name in names}
        learnable = decoder.learnable()
        self.learnt = {name: nn.Parameter(x.clone()) for name, x in learnable.items()}
        self._held = decoder.prepared(codes) if learnable else decoder.decode(codes).to(dtype)
        self._chain = Chain(tuple(self._tuned(link) for link in chain.links))

    def _tuned(self, link: Any) -> Any:
        """The link with parameters for its vectors."""
        return replace(link, **{name: self.vectors[name] for name in TUNED.get(type(link), ())})

    @property
    def W(self) -> Float[Tensor, "m n"]:
        """W~, as what is learnt is now."""
        if not self.learnt:
            return self._held
        return self._decoder.decode_with(self._held, self.learnt).to(self._dtype)

    def product(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """As `QuantizedLinear.product`; gradients reach what is tuned."""
        x_t = self._chain.input(x.to(torch.promote_types(x.dtype, torch.float32)))
        y = self._chain.output(linear(x_t.to(self._dtype), self.W).to(x_t.dtype))
        return y if self._scales is None else y * self._scales

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.vectors.values(), *self.learnt.values()]

    def stored(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The tuned tensors as the layer would hold them, and the `parameters` that these mean."""
        types = {name: x.dtype for name, x in self.layer.stored().items()}
        tensors = {name: x.data.to(types[name], copy=True) for name, x in self.vectors.items()}
        values = [x.float() for x in tensors.values()]
        if self.learnt:
            decoder = self._decoder.learned({name: x.data for name, x in self.learnt.items()})
            tensors |= decoder.tensors()
            values += decoder.learnable().values()
        return tensors, values


@dataclass(frozen=True)
class State:
    """The tuned tensors as they would be stored: each layer's by name, and the parameters."""

    packed: list[dict[str, Tensor]]
    others: list[Tensor]


class MasterWeights:
    """A context in which a module computes in float32 and these of its parameters are tuned.

    Beside `trained`, the vectors of every packed matrix are, and what its decoder has to learn. W~
    is in `dtype`. A state is the tuned tensors as they would be stored: signs in float16, centroids
    rounded as a file has them, vectors in the type they came in, and matrices with the values of
    the narrowest type that held them, as a file does. What is trained is never rounded itself, or
    no small step would count.
    """

    def __init__(
        self, module: nn.Module, trained: Iterable[nn.Parameter], *, dtype: torch.dtype
    ) -> None:
        # A rotation may gather all of |x| in one number, beyond the range of float16.
        dtype = torch.float32 if dtype == torch.float16 else dtype
        self._packed = [Tunable(layer, dtype) for layer in quantized_layers(module).values()]
        self.signs = [vector for one in self._packed for vector in one.vectors.values()]
        self.centroids = [x for one in self._packed for x in one.learnt.values()]
        self.others = list(dict.fromkeys(trained))
        self._old = {
            parameter: (parameter.data, parameter.requires_grad)
            for parameter in module.parameters()
            if parameter.is_floating_point()
        }
        self._kept: State | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*(p for one in self._packed for p in one.parameters), *self.others]

    @contextmanager
    def as_stored(self) -> Iterator[State]:
        """The state, with which the module computes inside the block."""
        packed = [one.stored() for one in self._packed]
        others = [p.data.to(_stored_as(self._old[p][0]), copy=True) for p in self.others]
        parameters, exact = self.parameters, [parameter.data for parameter in self.parameters]
        try:
            values = [x for _, of_one in packed for x in of_one] + others
            for parameter, x in zip(parameters, values, strict=True):
                parameter.data = x.to(parameter.dtype)
            yield State([tensors for tensors, _ in packed], others)
        finally:
            for parameter, x in zip(parameters, exact, strict=True):
                parameter.data = x

    def keep(self, state: State) -> None:
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
            for one, tensors in zip(self._packed, self._kept.packed, strict=True):
                for name, x in tensors.items():
                    setattr(one.layer, name, x)
            for parameter, x in zip(self.others, self._kept.others, strict=True):
                parameter.data = x.to(self._old[parameter][0].dtype)


def _stored_as(x: Tensor) -> torch.dtype:
    if x.ndim == 1:
        return x.dtype
    halves = (torch.float16, torch.bfloat16)
    return next((half for half in halves if torch.equal(x.to(half).to(x.dtype), x)), x.dtype)
