"""Which matrices of a model are quantized, and as what: enough to make room for their tensors."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, NotRequired, TypedDict, cast

from torch import nn

from quip.errors import QuipError, shown
from quip.packed.embedding import QuantizedEmbedding, tied_heads
from quip.packed.exchange import (
    embedding_at,
    embedding_like,
    empty_like,
    head_like,
    matrix_at,
    replace,
    stack_like,
)
from quip.packed.experts import unfuse
from quip.packed.files import DAMAGED
from quip.packed.linear import quantized_layers
from quip.packed.spec import Spec
from quip.packed.stack import Stack, stacks
from quip.shapes import Within, check_shape

# Of a file: 1 holds matrices of one specification, 2 of several, 3 embeddings among them.
FORMATS = (1, 2, 3)
SPECS = 1000  # of a file: no plan has more, and they are compared with one another


class Words(TypedDict):
    """A specification and the names of its matrices: a file of format 1, or a part of one of 2."""

    codebook: dict[str, Any]  # as Spec reads it
    transforms: list[Any]
    modules: list[str]
    stacks: NotRequired[list[Annotated[list[str], Within(2)]]]


class Several(TypedDict):
    """A file of format 2."""

    specs: Annotated[list[Words], Within(0, SPECS)]


class WithEmbeddings(Several):
    """A file of format 3."""

    embeddings: list[str]  # which of the modules are looked up in
    tied: dict[str, str]  # heads, and the embeddings whose weights are theirs


@dataclass(frozen=True)
class Layout:
    """Which modules of a model are packed, and as what; a stack is the names of its members."""

    modules: Mapping[str, Spec]  # quantized alone
    stacks: Mapping[tuple[str, ...], Spec] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()  # those of the modules that are looked up in
    tied: Mapping[str, str] = field(default_factory=dict)  # heads, and the embedding of each

    @classmethod
    def of(cls, model: nn.Module) -> "Layout":
        """The layout of a model's quantized matrices."""
        held = quantized_layers(model)
        layers = sorted(held.items())
        alone = {name: layer.spec for name, layer in layers if not isinstance(layer, Stack)}
        together = {}
        for members in sorted(stacks(model), key=list):
            first, *_ = members.values()
            together[tuple(members)] = first.whole.spec
        looked_up = tuple(name for name in alone if isinstance(held[name], QuantizedEmbedding))
        return cls(alone, together, looked_up, tied_heads(model))

    @classmethod
    def from_json(cls, words: Mapping[str, Any]) -> "Layout":
        """What `to_json` wrote; a `format` among the words says which of the two.

        Raises QuipError for words that are missing, or that this version does not know.
        """
        modules: dict[str, Spec] = {}
        stacked: dict[tuple[str, ...], Spec] = {}
        seen: set[str] = set()
        for part in _parts(words):
            spec = Spec.from_json(part["codebook"], part["transforms"])
            alone, together = sorted(part["modules"]), [*map(tuple, part.get("stacks", []))]
            if "specs" in words and not (alone or together):
                raise QuipError(
                    f"its config.json has a specification that names no matrix; {DAMAGED}"
                )
            modules |= dict.fromkeys(alone, spec)
            stacked |= dict.fromkeys(together, spec)
            for name in (*alone, *chain.from_iterable(together)):
                if name in seen:
                    raise QuipError(
                        f"its config.json names the matrix {shown(name)} twice; {DAMAGED}"
                    )
                seen.add(name)
        looked_up, tied = tuple(words.get("embeddings", ())), dict(words.get("tied", {}))
        if lost := (set(looked_up) - modules.keys()) | (set(tied.values()) - set(looked_up)):
            raise QuipError(
                f"its config.json says that {shown(min(lost))} is an embedding, and not what its "
                f"tensors mean; {DAMAGED}"
            )
        for name in looked_up:
            if (kind := modules[name].codebook["kind"]) != "grid" or modules[name].transforms:
                raise QuipError(
                    f"its config.json says that the embedding {shown(name)} is of the codebook "
                    f"{kind} or rotated, and rows are decoded of plain grids alone; {DAMAGED}"
                )
        return cls(modules, stacked, looked_up, tied)

    def to_json(self) -> dict[str, Any]:
        """The words of its one specification, with names; or of several, as a list `specs`."""
        parts = [self._words(spec) for spec in self.specs]
        if self.format == 1:
            return parts[0]
        more = {"embeddings": list(self.embeddings), "tied": dict(self.tied)}
        return {"specs": parts} | (more if self.format == 3 else {})

    @property
    def format(self) -> int:
        """The format that a file of these words needs; older versions of quip read 1 only."""
        if self.embeddings:
            return 3
        return 1 if len(self.specs) == 1 else 2

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The distinct specifications, each where it is first met."""
        found: list[Spec] = []
        for spec in (*self.modules.values(), *self.stacks.values()):
            found += [] if spec in found else [spec]
        return tuple(found)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all matrices, members of stacks one by one."""
        return (*self.modules, *chain.from_iterable(self.stacks))

    def only(self, spec: Spec) -> "Layout":
        """The part of it that is of this specification."""
        return Layout(
            {name: own for name, own in self.modules.items() if own == spec},
            {names: own for names, own in self.stacks.items() if own == spec},
        )

    def within(self, model: nn.Module) -> "Layout":
        """This layout by the names that this model has, whether with its head or without.

        Matrices outside the base model, as a packed head is, are left out of a model that is no
        more than that.
        """
        here = {name for name, _ in model.named_modules()}
        alone = getattr(model, "base_model", None) is model
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        modules = {own_name(model, name, here): spec for name, spec in self.modules.items()}
        if alone:
            modules = {k: x for k, x in modules.items() if k in here or k.startswith(prefix)}
        return Layout(
            modules,
            {
                tuple(own_name(model, name, here) for name in names): spec
                for names, spec in self.stacks.items()
            },
            tuple(own_name(model, name, here) for name in self.embeddings),
            {
                own_name(model, head, here): own_name(model, name, here)
                for head, name in self.tied.items()
                if head in here or not alone
            },
        )

    def _words(self, spec: Spec) -> dict[str, Any]:
        own = self.only(spec)
        words = {**spec.to_json(), "modules": list(own.modules)}
        return words | ({"stacks": [list(names) for names in own.stacks]} if own.stacks else {})

    def make_room(self, model: nn.Module) -> None:
        """Put empty packed modules, on the meta device, where the model has its dense ones.

        Experts are taken apart for it, all of the model: in our files none are fused. Raises
        Unavailable, naming the module, where a matrix is none of the model.
        """
        unfuse(model)
        for name, spec in self.modules.items():
            if name in self.embeddings:
                replace(model, name, embedding_like(embedding_at(model, name), spec))
            else:
                replace(model, name, empty_like(matrix_at(model, name), spec))
        for head, name in self.tied.items():
            replace(model, head, head_like(matrix_at(model, head), model.get_submodule(name)))
        for names, spec in self.stacks.items():
            old = {name: matrix_at(model, name) for name in names}
            for name, new in stack_like(old, spec).items():
                replace(model, name, new)


def _parts(words: Mapping[str, Any]) -> list[Words]:
    """The specifications, each with the names of its matrices; in format 1 there is one."""
    form = words.get("format", 2 if "specs" in words else 1)
    several = form != 1
    shape: Any = Several if several else Words
    if form == 3 or words.keys() & {"embeddings", "tied"}:
        shape = WithEmbeddings
    other: Any = Words if several else Several
    try:
        check_shape(words, shape)
        for word in other.__annotations__:
            if word in words:
                raise ValueError(f"{word} is a word of another format")
    except ValueError as error:
        raise QuipError(
            f"the quantization_config of its config.json is damaged ({error}); {DAMAGED}"
        ) from error
    return words["specs"] if several else [cast(Words, words)]


def own_name(model: nn.Module, name: str, here: Collection[str]) -> str:
    """The one of the names `here` that a name means which was given with or without a head.

    A model with a head calls `model.layers.0` what the same model without it calls `layers.0`.
    A name that means none of them stays as it is.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    meant = (name, name.removeprefix(prefix), prefix + name)
    return next((each for each in meant if each in here), name)
