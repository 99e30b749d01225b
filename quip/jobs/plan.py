"""A plan from a file: patterns of matrix names, and the flags of each one's recipe, in YAML.

    "*.v_proj": {wbits: 4, incoh_processing: true}
    "model.layers.0.*": {recipe: quip-3bit}

    head_bits: 6

The first pattern that matches a matrix counts. Flags are those of `quip run`, and each recipe is
complete: what it does not name is as by default, whatever the line says of all other matrices. The
row of embedding and head is no pattern, as their recipes differ in nothing but bits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from quip.errors import UsageError, shown
from quip.matrix.build import build_recipe
from quip.matrix.flags import FLAGS
from quip.matrix.methods import RECIPES
from quip.matrix.recipe import Recipe
from quip.model.plan import Plan, Rule
from quip.reading import read_yaml

HEAD = "head_bits"  # the row of embedding and head
HEAD_BITS = range(4, 9)


def read_plan(path: Path) -> dict[Any, Any]:
    """What a file says: pattern -> flags. Raises UsageError for one that is no such mapping."""
    words = read_yaml(path, flag="--plan")
    if not (isinstance(words, dict) and words):
        raise UsageError(f"--plan {path}: a mapping of patterns of matrix names to flags is needed")
    return words


def part_head(words: Mapping[Any, Any]) -> tuple[dict[Any, Any], int | None]:
    """What a plan says of the matrices of blocks, and the bits of embedding and head.

    Raises UsageError for bits that they cannot have. None: they stay as they are.
    """
    bits = words.get(HEAD)
    if HEAD in words and (type(bits) is not int or bits not in HEAD_BITS):
        raise UsageError(f"{HEAD} {shown(bits)}: a number of bits from 4 to 8 is needed")
    return {pattern: flags for pattern, flags in words.items() if pattern != HEAD}, bits


def build_plan(words: Mapping[Any, Any], *, default: Recipe | None = None) -> Plan:
    """The plan of these patterns and flags; `default` is for matrices that no pattern matches.

    Raises UsageError, naming the pattern, for flags that mean nothing.
    """
    if HEAD in words:
        raise UsageError(
            f"the plan's {HEAD} is no pattern of matrices: give it as `head_bits` of the experiment"
        )
    rules = []
    for pattern, flags in words.items():
        try:
            rules.append(Rule(_pattern(pattern), _recipe(flags)))
        except UsageError as error:
            raise UsageError(f"the plan's {shown(pattern)}: {error}") from error
    return Plan(rules=tuple(rules), default=default)


def _pattern(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise UsageError('a pattern of matrix names is needed, in quotes: "*.v_proj"')
    return pattern


def _recipe(flags: Any) -> Recipe:
    if not (isinstance(flags, Mapping) and flags):
        raise UsageError("a mapping of flags is needed, as in {wbits: 4} or {recipe: quip-4bit}")
    named = flags.get("recipe")
    if "recipe" in flags and not (isinstance(named, str) and named in RECIPES):
        raise UsageError(f"recipe {shown(named)}: not one of {', '.join(RECIPES)}")
    own = {name: flag_value(name, value) for name, value in flags.items() if name != "recipe"}
    if own.get("wbits") == 16:
        raise UsageError("wbits 16: a plan leaves no matrix as it is; give 2 to 8 bits")
    every = {**(RECIPES[named].flags if named else {}), **own}
    return build_recipe(**{FLAGS[name].name: value for name, value in every.items()})


def flag_value(name: Any, value: Any) -> Any:
    """A flag's value as its type; YAML has 1 for 1.0 and 8 for "8"."""
    if name not in FLAGS:
        raise UsageError(f"unknown flag {shown(name)}; a recipe has {', '.join(FLAGS)}")
    kinds = get_args(FLAGS[name].type) or (FLAGS[name].type,)
    wider = next((kind for kind in (float, str) if kind in kinds), None)
    if type(value) in kinds:
        return value
    if type(value) is int and wider:
        return wider(value)
    wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
    raise UsageError(f"{name} is {shown(value)}, and {wanted} is needed")
