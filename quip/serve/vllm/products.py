"""Which packed matrices a layer of vLLM is made of, and in what order their answers go.

vLLM computes some matrices of the same inputs as one layer: `qkv_proj` is q, k and v, one below the
other. A checkpoint holds them one by one, or as a stack, in an order of its own; or its model has
one matrix for all, as vLLM does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from quip.errors import UnsupportedModel
from quip.packed.layout import Layout
from quip.packed.spec import Spec

# Models of transformers have these as one matrix whose rows lie as vLLM's do; in others of other
# names (`query_key_value`) those of a head lie together, and vLLM sorts them as it loads.
FUSED = ("qkv_proj", "gate_up_proj")
REMEDY = "serve it with `quip serve`, or `quip export --dense` it"


@dataclass(frozen=True)
class Product:
    """A packed matrix, or a stack of some: where each of its parts stands in the layer."""

    spec: Spec
    places: tuple[int, ...]  # from the top of the layer; of a stack in its own order


def members(layer: str, merged: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of the matrices of a layer of vLLM; `merged` is its `packed_modules_mapping`."""
    parent, dot, last = layer.rpartition(".")
    return [f"{parent}{dot}{name}" for name in merged.get(last, [last])]


def products(layout: Layout, layer: str, merged: Mapping[str, Sequence[str]]) -> list[Product]:
    """What the packed matrices of a layer are computed as; nothing of a layer that is dense.

    Raises UnsupportedModel where vLLM's layer is a part of a stack, or dense in part.
    """
    names = members(layer, merged)
    if len(names) > 1 and layer in layout.modules:  # its model has one matrix there, as vLLM does
        names = [layer]
    place = {name: i for i, name in enumerate(names)}
    found = [Product(layout.modules[x], (place[x],)) for x in names if x in layout.modules]
    for stack, spec in layout.stacks.items():
        if place.keys().isdisjoint(stack):
            continue
        if beside := [name for name in stack if name not in place]:
            raise UnsupportedModel(
                f"{layer}: {beside[0]} is stacked with it in the checkpoint, and vLLM computes "
                f"them apart; {REMEDY}"
            )
        found.append(Product(spec, tuple(place[name] for name in stack)))
    packed = {names[i] for product in found for i in product.places}
    if found and (dense := [name for name in names if name not in packed]):
        raise UnsupportedModel(
            f"{layer}: vLLM computes {', '.join(names)} as one, and {dense[0]} is not quantized; "
            + REMEDY
        )
    return found


def rows(layer: str, sizes: Sequence[int], found: Sequence[Product]) -> list[int]:
    """How many rows each matrix of a layer has, whose parts in vLLM have so many (`sizes`).

    Raises UnsupportedModel where one matrix is all of the layer, and its rows may lie otherwise.
    """
    count = sum(len(product.places) for product in found)
    if count == len(sizes):
        return [*sizes]
    if count > 1 or layer.rpartition(".")[2] not in FUSED:
        raise UnsupportedModel(
            f"{layer}: one matrix in the checkpoint and {len(sizes)} in vLLM, which may sort its "
            f"rows as it loads; {REMEDY}"
        )
    return [sum(sizes)]


def in_order(found: Sequence[Product], sizes: Sequence[int]) -> list[slice] | None:
    """Where, in the answers of the products one after the other, the rows of each part lie.

    From the top of the layer, whose parts have so many rows; None where they lie so already.
    """
    places = [*chain.from_iterable(product.places for product in found)]
    if places == sorted(places):
        return None
    ends = [*accumulate(sizes[place] for place in places)]
    found_at = {i: slice(end - sizes[i], end) for i, end in zip(places, ends, strict=True)}
    return [found_at[i] for i in range(len(places))]
