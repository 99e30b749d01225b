"""--dry_run: what a line will need, told instead of done."""

import argparse
import json
from typing import Any

from quip.cli.parse import Arguments
from quip.cli.streams import say
from quip.errors import UsageError
from quip.jobs.requests import request


def dry_run_flags(group: argparse._ArgumentGroup) -> None:
    """Flags that tell what a command will need."""
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="do nothing, but tell from the sizes of the model and some two seconds of this "
        "machine's work: time by stage, memory, disk, for 1 to 8 processes, streamed or not",
    )
    group.add_argument(
        "--json", action="store_true", help="with --dry_run, everything that is known, as JSON"
    )


def refuse_json(args: Arguments) -> None:
    """Raise UsageError for --json, unless there is something that it speaks of."""
    if args.json and not args.dry_run:
        raise UsageError("--json is the form of what --dry_run tells: add --dry_run")


def foretold(args: Arguments, **own: Any) -> None:
    """Print what the line will need."""
    from quip.jobs.dry_run import Question, foretell
    from quip.jobs.report.forecast import forecast_words

    found = foretell(request(Question, args, **own))
    say(json.dumps(found, indent=2) if args.json else forecast_words(found))
