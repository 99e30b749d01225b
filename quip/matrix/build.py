"""Flags become a Recipe; those that no part of it reads are refused.

No part of the recipe is imported before all flags are known to mean something: a command line that
is refused does not wait for torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

from quip.codebooks.names import CODEBOOKS, Bits, Choice
from quip.errors import UsageError
from quip.matrix.books import READERS
from quip.matrix.flags import IGNORED, Flags
from quip.matrix.methods import EXTRAS, METHODS, ROTATIONS, UNROTATED, Method
from quip.matrix.said import as_line
from quip.matrix.takes import Take

if TYPE_CHECKING:
    from quip.matrix.polish import Polish
    from quip.matrix.recipe import Recipe


def build_recipe(**flags: Any) -> "Recipe":
    """The recipe of a command line, by the names of `Flags`.

    Raises UsageError for a combination that means nothing.
    """
    parts = check_flags(**flags)

    from quip import transforms
    from quip.matrix import feedback, order
    from quip.matrix.recipe import Recipe

    choice, book = parts.choice, parts.choice.codebook()
    passes = parts.passes - parts.method.swept_passes
    return Recipe(
        codebook=book,
        trials=tuple(replace(book, **change) for change in choice.trials),
        transforms=tuple(getattr(transforms, name)(**own) for name, own in parts.draws),
        order=getattr(order, parts.method.order),
        feedback=getattr(feedback, parts.method.feedback),
        group=choice.group,
        damp=parts.damp,
        polish=_polish(passes, choice.update),
        clamp_target=choice.clamp_target,
        stack=choice.stack,
    )


def _polish(passes: int, update: int) -> "tuple[Polish, ...]":
    """Greedy passes; with an update of centroids before them all and after each."""
    from quip.matrix.polish import Greedy

    if not update:
        return (Greedy(passes),) if passes else ()

    from quip.matrix.centroids import UpdateCentroids

    return (UpdateCentroids(update), *(Greedy(1), UpdateCentroids(update)) * passes)


def check_flags(**flags: Any) -> "Parts":
    """The parts of a recipe, in words. Raises UsageError for a combination that means nothing."""
    f = Flags(**flags)
    f.check()
    readers: dict[str, str] = {}
    parts = _read(f, readers)
    given = {name for name, value in flags.items() if value is not None and value is not False}
    for name in flags:
        if name in given and name not in readers:
            raise UsageError(_unread(f, name, given))
    return parts


def flags_read(**flags: Any) -> set[str]:
    """The names of the flags that some part of this recipe reads, given or not."""
    readers: dict[str, str] = {}
    _read(Flags(**flags), readers)
    return set(readers)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a recipe is made of, in words."""

    method: Method
    choice: Choice
    draws: tuple[tuple[str, Mapping[str, Any]], ...]  # of quip.transforms, and their options
    damp: float
    passes: int


def _read(f: Flags, readers: dict[str, str]) -> Parts:
    """The parts; `readers` is told who read each flag that was read."""
    take = Take(replace(f, wbits=_bits(f)), "every recipe", readers)
    for name in ("wbits", *IGNORED):
        take(name)
    method, entry = METHODS[take("quant")], CODEBOOKS[take("codebook")]
    read = READERS.get(entry.home) or import_module(f"quip.codebooks.{entry.home}").of
    choice: Choice = read(take.part(f.codebook))
    incoherent, rescales, rotates = map(take, ("incoh_processing", "pre_rescale", "pre_proj"))
    draws: list[tuple[str, Mapping[str, Any]]] = []
    if rescales or incoherent:
        draws.append(("RescaleDraw", {}))
    if rotates or incoherent or choice.rotation or f.rotation == UNROTATED:
        draws += _rotation(take, choice.rotation, asked=rotates or incoherent)
    if take("pre_rescale_out"):
        draws = _rescaling_outputs(draws)
    return Parts(
        method=method,
        choice=choice,
        draws=tuple(draws),
        damp=take("percdamp"),
        passes=_passes(take, method, choice),
    )


def _bits(f: Flags) -> Bits:
    """Bits per weight: those said, or the only ones of the codebook; what is whole is an int."""
    only, bits = CODEBOOKS[f.codebook].only_bits, CODEBOOKS[f.codebook].bits
    if only is not None and f.wbits not in (None, only):
        raise UsageError(
            f"--wbits {f.wbits}: {f.codebook} has {only} bits; leave out --wbits, or name another "
            "--codebook"
        )
    found = f.wbits if only is None else only
    if found in bits:
        return bits[bits.index(found)]
    if found is not None and found % 1:
        other = next((name for name, row in CODEBOOKS.items() if found in row.bits), None)
        raise UsageError(
            f"--wbits {found}: {f.codebook} has {', '.join(map(str, bits))} bits; say one of them"
            + (f", or --codebook {other}" if other else "")
        )
    raise UsageError(
        f"--wbits {found}: {bits[0]} to {bits[-1]} bits can be quantized to (16 evaluates only)"
    )


def _rotation(
    take: Take, default: str | None, *, asked: bool
) -> list[tuple[str, Mapping[str, Any]]]:
    """The rotation, if it is any."""
    one = take.part("rotations")
    name, extra = one("rotation"), one("pre_proj_extra")
    if name is not None and extra is not None:
        raise UsageError("--rotation and --pre_proj_extra both choose a rotation: leave one out")
    if name == UNROTATED:
        if asked:
            raise UsageError(
                "--rotation none with --pre_proj or --incoh_processing, which rotate: leave one out"
            )
        return []
    name = name or default or "kronecker"
    row = ROTATIONS[name] if extra is None else EXTRAS[extra]
    own = take.part(f"--rotation {name}")
    return [(row.draw, {**row.options, **{key: own(flag) for key, flag in row.takes.items()}})]


def _rescaling_outputs(
    draws: list[tuple[str, Mapping[str, Any]]],
) -> list[tuple[str, Mapping[str, Any]]]:
    """The draws with factors of outputs, in the signs of these where there are such."""
    *before, (name, options) = draws or [("", {})]
    if name == "HadamardDraw":
        return [*before, (name, {**options, "rescales_outputs": True})]
    if name == "KroneckerDraw":
        return [*before, ("OutputRescaleDraw", {}), (name, options)]
    raise UsageError(
        "--pre_rescale_out balances the rows of a matrix that is then rotated: say --pre_proj, "
        "--incoh_processing or --rotation hadamard, or leave it out"
    )


def _passes(take: Take, method: Method, choice: Choice) -> int:
    """Greedy passes: those said, or those of the method, or with feedback of the codebook."""
    said, usual = take("npasses"), 0 if method.feedback == "none" else choice.passes
    passes: int = (method.passes or usual) if said is None else said
    if method.swept_passes > passes:
        raise UsageError(f"--quant {take('quant')} --npasses 0 would round nothing: say 1 or more")
    if passes and "unbiased" in take.readers and take("unbiased"):
        raise UsageError(
            f"--unbiased with {passes} greedy passes: a pass rounds to nearest and undoes it; "
            "say --npasses 0 with ldlqRG, or leave out --unbiased"
        )
    return passes


def _unread(f: Flags, name: str, given: set[str]) -> str:
    """The refusal of a flag that nothing read: who reads it, and what would make all be read."""
    value = {name: getattr(f, name)}
    parts = (readers[name] for _, readers, _ in _near(Flags(wbits=2, **value)) if name in readers)
    *first, last = dict.fromkeys(parts)
    owners = f"{', '.join(first)} and {last}" if first else last
    works = (how for how, readers, sound in _near(f) if sound and given <= readers.keys())
    shown, remedy = (" ".join(as_line(x)).replace("=", " ") for x in (value, next(works, {})))
    return f"{shown} speaks of {owners}: {f'say {remedy}, or ' if remedy else ''}leave it out"


def _near(f: Flags) -> Iterator[tuple[Mapping[str, Any], Mapping[str, str], bool]]:
    """Changes of the flags, nearest first: who then reads what, and whether that can be built."""
    processing: list[dict[str, Any]] = [
        {"pre_proj": True},
        {"incoh_processing": True},
        *({"rotation": rotation} for rotation in ROTATIONS),
        *({"qfn": grid} for grid in "ab"),
        {"incoh_processing": False},
    ]
    processing += [a | b for a, b in combinations(processing, 2)]
    books: list[dict[str, Any]] = [{"codebook": book} for book in CODEBOOKS]
    books += [{"codebook": book, "wbits": row.bits[0]} for book, row in CODEBOOKS.items()]
    both = (book | how for book in books for how in processing)
    for change in chain(processing, books, both):
        readers: dict[str, str] = {}
        try:
            _read(replace(f, **change), readers)
            yield change, readers, True
        except UsageError:
            yield change, readers, False
