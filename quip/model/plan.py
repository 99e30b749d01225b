"""Mixed precision: which recipe each matrix of a model gets, by patterns of its name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from quip.errors import UsageError
from quip.matrix.recipe import Recipe, describe

SHOWN = 3  # names that a refusal lists


@dataclass(frozen=True)
class Rule:
    """A recipe, and the matrices that it is for."""

    pattern: str  # of full dotted names, as a shell has them: * stands for dots too
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe for each matrix: that of the first rule whose pattern matches its name."""

    rules: tuple[Rule, ...] = ()
    default: Recipe | None = None  # of matrices that no pattern matches; None: there must be none

    @classmethod
    def of(cls, how: "Recipe | Plan") -> "Plan":
        """The plan itself, or that of one recipe for all."""
        return how if isinstance(how, Plan) else cls(default=how)

    def each(self) -> list[Recipe]:
        """The recipes of all rules, and the one of what they leave."""
        return [rule.recipe for rule in self.rules] + ([self.default] if self.default else [])

    def recipes(self, names: Iterable[str]) -> dict[str, Recipe]:
        """The recipe of each of a model's matrices, by full dotted name.

        Raises UsageError, with names, for matrices without a recipe and for rules without a matrix.
        """
        names = list(names)
        rules = {name: self._rule(name) for name in names}
        for rule in self.rules:
            if not any(rule is used for used in rules.values()):
                raise UsageError(self._unused(rule, names))
        found: dict[str, Recipe] = {}
        left = []
        for name, used in rules.items():
            recipe = used.recipe if used else self.default
            if recipe is None:
                left.append(name)
            else:
                found[name] = recipe
        if left:
            raise UsageError(
                f"no pattern of the plan matches {_some(left)}; add one, or give a recipe for all "
                "others (--wbits, --codebook or --recipe)"
            )
        return found

    def words(self) -> dict[str, Any]:
        """The patterns in their order, and the recipe of each, fit for JSON."""
        return {
            "patterns": [rule.pattern for rule in self.rules],
            "recipes": {rule.pattern: describe(rule.recipe) for rule in self.rules},
        }

    def _rule(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)

    def _unused(self, rule: Rule, names: list[str]) -> str:
        """Why no matrix gets the recipe of this rule, and what to do."""
        if any(fnmatchcase(name, rule.pattern) for name in names):
            return (
                f"the pattern {rule.pattern!r} matches no matrix that those before it leave; "
                "move it up, or leave it out"
            )
        close = get_close_matches(rule.pattern, names, n=SHOWN, cutoff=0)
        return (
            f"the pattern {rule.pattern!r} matches no matrix of the model, whose names are like "
            f"{', '.join(close)}"
        )


def described(how: Recipe | Plan | None) -> dict[str, Any]:
    """What a report says of a recipe or a plan: `recipe`, and `plan` where that has rules."""
    plan = how and Plan.of(how)
    words: dict[str, Any] = {"recipe": plan and plan.default and describe(plan.default)}
    return words | ({"plan": plan.words()} if plan and plan.rules else {})


def by_recipe(names: Iterable[str], recipes: Mapping[str, Recipe]) -> list[list[str]]:
    """The names in their order, those of equal recipes together."""
    groups: list[list[str]] = []
    for name in names:
        same = (group for group in groups if recipes[group[0]] == recipes[name])
        own = next(same, None)
        if own is None:
            groups.append([name])
        else:
            own.append(name)
    return groups


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
