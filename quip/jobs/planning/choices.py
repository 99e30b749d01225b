"""The widths that a plan chooses from: recipes of one codebook, and what each makes of a matrix."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quip.codebooks.names import CODEBOOKS, LATTICES, Bits
from quip.errors import UsageError
from quip.jobs.forecast.shape import Input
from quip.jobs.forecast.sizes import Work, packed_size
from quip.matrix.build import build_recipe, check_flags
from quip.matrix.flags import FLAGS
from quip.matrix.quantize import quantize_matrix
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.packed.linear import QuantizedLinear
from quip.packed.spec import Spec

USUAL: dict[str, tuple[Bits, ...]] = {"trellis": (1.5, 2, 2.5, 3, 4)}
SAMPLE = (512, 384)  # of the Gaussian matrix that is rounded; sizes that lattices and tiles ask for


def widths_of(codebook: str) -> tuple[Bits, ...]:
    """The bits per weight that there are of this codebook, or of its family."""
    if codebook in LATTICES:
        return tuple(row.bits for row in LATTICES.values())
    return CODEBOOKS[codebook].bits


def usual_widths(codebook: str) -> tuple[Bits, ...]:
    """The widths that are chosen from if none are named."""
    return USUAL.get(codebook) or tuple(b for b in widths_of(codebook) if 2 <= b <= 4)


def flags_of(flags: Mapping[str, Any], width: Bits) -> dict[str, Any]:
    """The flags of a recipe of so many bits, where `flags` say all else; as a plan has them.

    Raises UsageError for flags that mean nothing.
    """
    codebook = flags["codebook"]
    if width not in widths_of(codebook):
        there = ", ".join(map(str, widths_of(codebook)))
        raise UsageError(f"--choices {width}: {codebook} has {there} bits; choose among these")
    if codebook in LATTICES:
        own: dict[str, Any] = {
            "codebook": next(name for name, row in LATTICES.items() if row.bits == width)
        }
    else:
        own = {"codebook": codebook, "wbits": width}
    found = {**flags, **own}
    check_flags(**{FLAGS[name].name: value for name, value in found.items()})
    return found


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One width: its recipe, and what that makes of Gaussian weights where inputs do not matter."""

    width: Bits  # bits of the codes of a weight
    flags: Mapping[str, Any]
    recipe: Recipe
    mse: float  # |W_hat - W|^2 / |W|^2
    spec: Spec

    @classmethod
    def of(cls, width: Bits, flags: Mapping[str, Any]) -> "Choice":
        """Rounds one Gaussian matrix, with H = I."""
        recipe = build_recipe(**{FLAGS[name].name: value for name, value in flags.items()})
        W = torch.randn(*SAMPLE, generator=rng_for(0, "choices"))
        f = W.square().sum(1)  # which rescales no output
        quantized = quantize_matrix(
            *(W, torch.eye(SAMPLE[1]), recipe), rng=rng_for(0, "rounding"), name="a sample", f=f
        )
        error = (quantized.dequantize() - W).double().square().sum() / W.double().square().sum()
        layer = QuantizedLinear.from_matrix(quantized, None)
        return cls(width=width, flags=flags, recipe=recipe, mse=float(error), spec=layer.spec)

    def bits(self, one: Input, rows: tuple[int, ...]) -> int:
        """What a file holds of a matrix of an input, or of a stack of several."""
        return 8 * packed_size(Work(one, rows, self.recipe), self.spec)[0]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Matrices that get one width, and what each width takes."""

    names: tuple[str, ...]
    patterns: tuple[str, ...]  # that match these names alone
    kind: str  # the last part of their names
    block: int
    weights: int
    choices: tuple[Choice, ...]  # that all of them can have, the narrowest first
    bits: tuple[int, ...]  # that each takes


def groups_of(
    inputs: Sequence[Input], choices: Sequence[Choice], *, whole_stacks: bool
) -> list[Group]:
    """What chooses together: each matrix alone, the experts of a block, stacks if these are whole.

    Raises UsageError, naming it, for a matrix that can have none of the choices.
    """
    members: dict[tuple[str, ...], list[tuple[Input, tuple[int, ...]]]] = {}
    for one in inputs:
        stacked = whole_stacks and len(one.names) > 1
        parts = [range(len(one.names))] if stacked else [[i] for i in range(len(one.names))]
        for part in parts:
            patterns = tuple(_pattern(one.names[i]) for i in part)
            own = Input(
                block=one.block,
                columns=one.columns,
                names=tuple(one.names[i] for i in part),
                rows=tuple(one.rows[i] for i in part),
            )
            members.setdefault(patterns, []).append((own, own.rows))
    return [_group(patterns, own, choices) for patterns, own in members.items()]


def _group(
    patterns: tuple[str, ...],
    members: Sequence[tuple[Input, tuple[int, ...]]],
    choices: Sequence[Choice],
) -> Group:
    able = [choice for choice in choices if _all_can(choice.recipe, members)]
    if not able:
        one, rows = members[0]
        choices[0].recipe.check(rows[0], one.columns, one.names[0])
        raise UsageError(f"{one.names[0]}: no one of --choices can do it; name others")
    return Group(
        names=tuple(name for one, _ in members for name in one.names),
        patterns=patterns,
        kind="+".join(pattern.rpartition(".")[2] for pattern in patterns),
        block=members[0][0].block,
        weights=sum(one.weights for one, _ in members),
        choices=tuple(able),
        bits=tuple(sum(_bits(choice, one, rows) for one, rows in members) for choice in able),
    )


def _all_can(recipe: Recipe, members: Iterable[tuple[Input, tuple[int, ...]]]) -> bool:
    return all(recipe.can_do(m, one.columns) for one, rows in members for m in rows)


def _bits(choice: Choice, one: Input, rows: tuple[int, ...]) -> int:
    recipe = choice.recipe
    if len(rows) > 1 and recipe.stack and recipe.can_do(sum(rows), one.columns):
        return choice.bits(one, rows)
    return sum(choice.bits(one, (m,)) for m in rows)


def _pattern(name: str) -> str:
    """A matrix by its name; one of an expert, with those of all experts of its block."""
    before, experts, after = name.partition(".experts.")
    number, dot, rest = after.partition(".")
    return f"{before}.experts.*.{rest}" if experts and dot and number.isdecimal() else name
