"""A table of a paper as data: its rows, columns and models, and what is read off each cell.

A description is a YAML file; those of the papers lie beside this module, and `quip table` takes
the path of any other. Rows and columns are flags of `quip run`: a cell is one run with the flags
of its table, column and row (a row's win), and each measure is a path into that run's report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from quip.errors import UsageError, shown
from quip.jobs.plan import flag_value
from quip.matrix.build import build_recipe
from quip.matrix.flags import FLAGS
from quip.matrix.methods import RECIPES
from quip.matrix.recipe import Recipe
from quip.reading import read_yaml
from quip.research.tables.tuning import (
    FINETUNE,
    block_tuning,
    model_tuning,
    recipe_flags,
    run_options,
)
from quip.research.tables.words import Description, Label
from quip.shapes import check_shape

FOLDER = Path(__file__).parent
LABELS = {"wikitext2": "Wiki", "ptb-new": "PTB", "c4-new": "C4"}  # as the papers call them
COMPARED = "compared"  # with the original: means over the texts of divergence and agreement
TEXTS = ("run", "saved")  # kinds that are measured on texts and tasks


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is read off a report: the number at a path."""

    label: str
    path: tuple[str, ...]
    scale: float = 1.0
    inverse: bool = False  # scale / number
    better: str = "lower"  # or higher, or neither

    @property
    def axis(self) -> str:
        """What an axis of it is called."""
        match self.path[0]:
            case "perplexity" | "mean_perplexity":
                return "perplexity" if self.label == "perplexity" else f"perplexity, {self.label}"
            case "tasks":
                return f"accuracy in percent, {self.label}"
        return self.label

    def of(self, report: Mapping[str, Any]) -> float | None:
        """The value, or None where the report has none."""
        found: Any = report
        for key in self.path:
            if not isinstance(found, Mapping) or key not in found:
                return None
            found = found[key]
        try:
            value = float("none" if isinstance(found, bool) else found)
            return self.scale / value if self.inverse else self.scale * value
        except (TypeError, ValueError, ArithmeticError):
            return None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row or a column."""

    label: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, str] = field(default_factory=dict)  # what finds its published cells
    difference: tuple[str, ...] = ()  # of two rows, which this one is instead of runs
    ratio: tuple[str, ...] = ()
    published: bool = False  # of another method: nothing is run, the paper's numbers stand alone

    @property
    def is_run(self) -> bool:
        """Whether its cells are runs of their own."""
        return not (self.parts or self.published)

    @property
    def parts(self) -> tuple[str, ...]:
        """The rows that it is made of, if it is no run itself."""
        return self.difference or self.ratio

    def combine(self, values: Sequence[float | None]) -> float | None:
        """Its number, of its parts' numbers or its own."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        if self.difference:
            return known[0] - known[1]
        if self.ratio:
            return known[0] / known[1] if known[1] else None
        return known[0]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table or figure of a paper."""

    name: str
    title: str
    source: str
    models: tuple[str, ...]
    rows: tuple[Line, ...]
    columns: tuple[Line, ...]
    kind: str = "run"
    flags: Mapping[str, Any] = field(default_factory=dict)  # of every cell
    paper: Mapping[str, str] = field(default_factory=dict)  # of every cell
    beside: str = ""  # the paper's model whose numbers stand beside models that no paper has
    dataset: str = "c4"
    evaluate: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = ()
    by: str = "columns"  # what runs along the plot: columns, or models
    note: str = ""
    cost: str = "not run here"  # minutes, on which machine and model

    def flags_of(self, row: Line, column: Line) -> dict[str, Any]:
        return {**self.flags, **column.flags, **row.flags}

    def find(self, label: str) -> Line:
        return next(row for row in self.rows if row.label == label)


def table_names() -> tuple[str, ...]:
    """The names of the descriptions in the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read_table(name: str) -> Table:
    """The description of this name, or in the file of this path.

    Raises UsageError for what is none, and for flags that mean nothing together.
    """
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(
            f"table {name}: choose {', '.join(table_names())}, or the path of a .yaml file "
            "that describes one"
        )
    found = read_yaml(path, dict[str, Any])
    try:
        return _table(path.stem, found)
    except (TypeError, ValueError) as error:  # of tunings, whose names and numbers are their own
        raise UsageError(f"{path}: {error}") from error


def recipe_of(flags: Mapping[str, Any]) -> Recipe | None:
    """The recipe of a cell's flags; None for 16 bits, the model as it is."""
    if flags.get("wbits") == 16:
        return None
    for name in flags:
        if name not in FLAGS:
            raise UsageError(f"unknown flag {shown(name)}; names are those of `quip run`")
    return build_recipe(**{FLAGS[k].name: flag_value(k, value) for k, value in flags.items()})


def _table(name: str, given: Mapping[str, Any]) -> Table:
    unknown = set(given) - {f.name for f in fields(Table)} - {"measure"}
    if unknown:
        raise UsageError(f"unknown name {shown(min(unknown, key=str))}")
    check_shape(given, Description)
    words = {k: v for k, v in given.items() if k not in ("rows", "columns", "measures")}
    for key in ("models", "evaluate", "tasks"):
        words[key] = tuple(words.get(key, ()))
    words["paper"] = _words(words.get("paper", {}))
    measures = given.get("measures") or {}
    table = Table(
        name=name,
        rows=_lines(given["rows"]),
        columns=_lines(given["columns"]),
        measures=tuple(
            Measure(label=label, **{**spec, "path": tuple(spec["path"]), **_float(spec, "scale")})
            for label, spec in measures.items()
        )
        or perplexities(words["evaluate"]),
        **words,
    )
    _check(table)
    return table


def _float(spec: Mapping[str, Any], key: str) -> dict[str, float]:
    return {key: float(spec[key])} if key in spec else {}


def perplexities(datasets: Sequence[str]) -> tuple[Measure, ...]:
    return tuple(
        Measure(label=LABELS.get(name, Path(name).stem), path=("perplexity", name))
        for name in datasets
    )


def _lines(given: Mapping[Label, Mapping[str, Any] | None]) -> tuple[Line, ...]:
    lines = []
    for label, spec in given.items():
        spec = dict(spec or {})
        parts = {key: tuple(spec.pop(key, ())) for key in ("difference", "ratio")}
        published = spec.pop("published", False)
        paper = _words(spec.pop("paper", {}))
        if (recipe := spec.pop("recipe", None)) is not None:
            spec = {**_of_recipe(recipe), **spec}
        lines.append(Line(label=str(label), flags=spec, paper=paper, published=published, **parts))
    return tuple(lines)


def _words(paper: Mapping[str, Label]) -> dict[str, str]:
    """What finds published cells, as their files have it."""
    return {key: str(value) for key, value in paper.items()}


def _of_recipe(name: str) -> Mapping[str, Any]:
    """The flags of a named recipe, so that a cell is kept by what is run."""
    if name not in RECIPES:
        raise UsageError(f"recipe {shown(name)}: not one of {', '.join(RECIPES)}")
    return RECIPES[name].every


def _check(table: Table) -> None:
    labels = {row.label for row in table.rows}
    if not table.measures:
        raise UsageError("nothing is measured: name `evaluate` or `measures`")
    if any(m.path[0] == COMPARED for m in table.measures) and not (
        table.kind == "run" and table.evaluate
    ):
        raise UsageError(f"{COMPARED} is of runs and of texts: say `evaluate`, and no other kind")
    for row in table.rows:
        if row.parts and not (set(row.parts) <= labels and len(row.parts) == 2):
            raise UsageError(f"row {shown(row.label)}: it is made of two rows, by label")
        if not row.is_run or table.kind == "hessians":
            continue
        for column in table.columns:
            flags = table.flags_of(row, column)
            recipe = recipe_of(recipe_flags(flags))
            if not recipe and (table.kind == "saved" or FINETUNE in flags):
                raise UsageError(f"row {shown(row.label)}: 16 bits make no checkpoint")
            block_tuning(flags), model_tuning(flags), run_options(flags)
