"""`quip table NAME`: a table of the paper, ours beside the paper's; runs what is missing."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quip.cli.output import aligned, names
from quip.cli.parse import refuse_small
from quip.cli.streams import say
from quip.cli.values import place, seed
from quip.errors import UsageError
from quip.jobs.requests import request

if TYPE_CHECKING:
    from quip.research.tables.cells import Cell, Settings
    from quip.research.tables.description import Table

HELP = "a table or figure of the paper: run the missing cells, show them beside the paper's"
EXAMPLES = """
quip table --list
quip table perplexity --models facebook/opt-125m --dry_run     # the cells, with minutes and memory
quip table perplexity --models facebook/opt-125m
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add(
        "name",
        type=place,
        nargs="?",
        metavar="NAME",
        help="of the table (--list), or a .yaml file like them",
    )
    add("--list", action="store_true", help="list the tables, and what stands in them")
    _choice_flags(parser.add_argument_group("what is run"))
    _data_flags(parser.add_argument_group("data and evaluation"))
    add = parser.add_argument_group("machine and output").add_argument
    add("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="what models compute in (default auto: float32)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/tables"),
        metavar="DIR",
        help="a folder for the cells, which all tables share, and for NAME.md, .csv, .json and "
        ".png (default runs/tables)",
    )
    parser.set_defaults(call=call)


def _choice_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--models", metavar="A,B,...", help="models (default: those of the paper's table)")
    add("--rows", metavar="A;B;...", help="rows by label (default: all)")
    add("--columns", metavar="A;B;...", help="columns by label (default: all)")
    add(
        "--dry_run",
        action="store_true",
        help="print each cell with the time and memory that it should take, and run nothing",
    )
    add("--render", action="store_true", help="run nothing: show what has been run by now")


def _data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset", type=place, metavar="D", help="calibration text (default: the table's)")
    add(
        "--eval_datasets",
        metavar="A,B,...",
        help="where perplexity is measured (default: where the table does)",
    )
    add("--tasks", metavar="A,B,...", help="zero-shot tasks (default: the table's)")
    add("--nsamples", type=int, default=128, metavar="N", help="calibration windows (default 128)")
    add("--seqlen", type=int, metavar="N", help="tokens in a window (default: at most 2048)")
    add("--eval_nsamples", type=int, metavar="N", help="the first N windows (default: all)")
    add("--limit", type=int, metavar="N", help="the first N documents of each task (default: all)")
    add("--batch_size", type=int, default=8, metavar="N", help="of zero-shot tasks (default 8)")
    add("--storycloze_csv", type=Path, metavar="FILE", help="the StoryCloze file")
    add("--seed", type=seed, default=0, metavar="N", help="of sampling and rotations (default 0)")


def call(args: argparse.Namespace) -> None:
    """List, estimate or run; then show the table."""
    refuse_small(args, nsamples=1, seqlen=2, eval_nsamples=1, limit=1, batch_size=1)
    if args.list:
        say(_listing(args.name))
        return
    if args.name is None:
        raise UsageError("name a table, or --list them")

    from quip.research.tables.cells import cells
    from quip.research.tables.description import read_table
    from quip.research.tables.record import record_of, write_record
    from quip.research.tables.rendering import markdown
    from quip.research.tables.running import run_missing
    from quip.research.tables.selection import select, settle

    table = read_table(args.name)
    table = select(table, rows=_labels(args.rows), columns=_labels(args.columns))
    _refuse(args, table)
    settings = _settings(args, table)
    table = settle(table, settings)
    models = _models(args, table)
    found = list(cells(table, models, settings, args.out))
    if args.dry_run:
        say(_plan(found))
        return
    try:
        if not args.render:
            run_missing(found)
    finally:  # what is known by then, whatever ended the run
        record = record_of(table, models, settings, args.out)
        paths = write_record(record, args.out)
    say(markdown(record))
    say(f"written: {', '.join(map(str, paths))}")


def _refuse(args: argparse.Namespace, table: "Table") -> None:
    """Raise UsageError for flags that say nothing of this table."""
    from quip.research.tables.description import TEXTS

    if args.dry_run and args.render:
        raise UsageError("--dry_run shows what would be run, --render what was: leave one out")
    for name in ("eval_datasets", "tasks"):
        if getattr(args, name) is not None and table.kind not in TEXTS:
            raise UsageError(f"--{name}: {table.name} measures neither texts nor tasks")
    for name in ("limit", "storycloze_csv"):
        if getattr(args, name) is not None and not (args.tasks or table.tasks):
            raise UsageError(f"--{name} speaks of zero-shot tasks: name some with --tasks A,B")


def _models(args: argparse.Namespace, table: "Table") -> Sequence[str]:
    from quip.research.tables.cells import slug

    models = names(args.models, "--models") if args.models else table.models
    shown = [slug(model) for model in models]
    for name in shown:
        if shown.count(name) > 1:
            raise UsageError(f"--models: two of them are shown as {name}; make a table of each")
    return models


def _labels(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(filter(None, (x.strip() for x in text.split(";"))))


def _settings(args: argparse.Namespace, table: "Table") -> "Settings":
    from quip.research.tables.cells import Settings

    def chosen(text: str | None, flag: str, default: tuple[str, ...]) -> tuple[str, ...]:
        return default if text is None else names(text, flag)

    has_stories = args.storycloze_csv is not None  # a task of the table's, if its file is there
    tasks = tuple(name for name in table.tasks if has_stories or name != "storycloze")
    return request(
        Settings,
        args,
        dataset=args.dataset or table.dataset,
        evaluate=chosen(args.eval_datasets, "--eval_datasets", table.evaluate),
        tasks=chosen(args.tasks, "--tasks", tasks),
    )


def _listing(name: str | None) -> str:
    from quip.research.tables.description import read_table
    from quip.research.tables.description import table_names as tables

    if name is None:
        width = max(map(len, tables()))
        found = map(read_table, tables())
        return "\n".join(f"{t.name:<{width}}  {t.title} ({t.source})" for t in found)
    table = read_table(name)
    lines = {
        "title": f"{table.title} ({table.source})",
        "models": ", ".join(table.models),
        "rows": "; ".join(row.label for row in table.rows),
        "columns": "; ".join(column.label for column in table.columns),
        "measures": ", ".join(measure.label for measure in table.measures),
        "calibration": table.dataset,
        "cost": table.cost,
    }
    return "\n".join(f"{key:<13}{words}" for key, words in lines.items())


def _plan(found: "Sequence[Cell]") -> str:
    from quip.jobs.report.text import size_words
    from quip.research.tables.estimate import Estimate, estimates

    lines = [("cell", "state", "time", "memory")]
    total, unknown = 0.0, set()
    for cell, estimate in zip(found, estimates(found), strict=True):
        done = not cell.missing()
        words = ("-", "-")
        if isinstance(estimate, Estimate):
            words = (_time(estimate.seconds), size_words(estimate.bytes))
            total += 0 if done else estimate.seconds
        else:
            unknown.add(estimate)
        name = f"{cell.folder.parent.name}/{cell.folder.name}"
        lines.append((name, "done" if done else cell.report().get("status", "not run"), *words))
    notes = [f"missing cells: about {_time(total)}", *sorted(unknown)]
    return "\n".join([aligned(lines), "", *notes])


def _time(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.1f} min"
    return f"{minutes / 60:.0f} h" if minutes < 6000 else f"{minutes / 1440:.0f} days"
