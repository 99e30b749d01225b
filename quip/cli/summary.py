"""`quip summary DIR`: what the Hessians of a store are like, and what processing makes of them."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quip.cli.flags import add_flag
from quip.cli.output import aligned
from quip.cli.streams import say
from quip.cli.values import place, seed
from quip.errors import UsageError
from quip.jobs.requests import request

HELP = "statistics of stored Hessians, before and after incoherence processing"
EXAMPLES = """
quip summary demo-hessians --model demo --out runs/demo-summary
"""
COLUMNS = {
    "rank": "rank",
    "above_1_percent": "> 1 %",
    "D_backwards": "tr(D)/tr(H)",
    "mu": "mu_H",
    "bound": "bound",
    "tight_bound": "tight bound",
    "log10_condition": "log10 cond",
    "mean_share": "mean's share",
}
WEIGHTS = {"mu_W": "mu_W", "kurtosis": "kurtosis"}


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add("store", type=Path, metavar="DIR", help="a store written by `quip hessians ... --save DIR`")
    add(
        "--model",
        type=place,
        metavar="MODEL",
        help="the model of the store: its weights are rescaled and rotated with the Hessians, and "
        "summarized too (without it Hessians are only rotated)",
    )
    add_flag(parser, "rotation", default="kronecker", help="as for `quip run` (default kronecker)")
    add("--no_rescale", action="store_true", help="rotate only")
    add_flag(
        parser,
        "percdamp",
        help="damping before tr(D) and rescaling, as a share of the mean diagonal (default 0.01)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of rotations, as for a run (default 0)")
    add(
        "--layer",
        metavar="NAME",
        help="the matrix that heat maps show (default: the last input of the middle block)",
    )
    add("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--json", action="store_true", help="print everything that is known, as JSON")
    add("--out", type=Path, metavar="DIR", help="a new or empty folder for tables and plots")
    add("--overwrite", action="store_true", help="write where files are in --out")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Summarize, and print."""
    if args.overwrite and args.out is None:
        raise UsageError("--overwrite speaks of --out: name the folder with --out DIR")
    if args.layer and args.out is None:
        raise UsageError("--layer speaks of plots: name a folder for them with --out DIR")
    if args.no_rescale and args.model is None:
        raise UsageError("--no_rescale speaks of weights: name the model with --model")

    from quip.jobs.report.plots import can_plot
    from quip.research.hessians.summary import SummaryRequest, summarize

    summary = summarize(
        request(
            SummaryRequest,
            args,
            rescale=not args.no_rescale,
            pictures=args.out is not None and can_plot(),
        )
    )
    found = summary.as_json()
    say(json.dumps(found, indent=2, allow_nan=False) if args.json else summary_table(found))


def summary_table(found: Mapping[str, Any]) -> str:
    """What a summary came to, in a few lines for a person."""
    parts = [_heading(found), _hessians(found)]
    if found["weight_means"]:
        parts.append(_means(found["weight_means"], WEIGHTS, "matrices"))
    return "\n\n".join([*parts, _legend(found)])


def _heading(found: Mapping[str, Any]) -> str:
    store, inputs = found["store"], found["inputs"]
    first = [row for row in inputs if row["processing"] == "original"]
    on = store["calibration"] or {}
    matrices = sum(row["matrices"] for row in first)
    entering = "" if store["source"] == "original" else ", behind quantized blocks"
    weights = f"weights of {found['model']}" if found["model"] else "no weights (--model)"
    return (
        f"{store['folder']}: {store['model']} on {on.get('dataset')}, {first[0]['tokens']:,} "
        f"tokens; {len(first)} inputs of {matrices} matrices{entering}\n"
        f"{weights}; rotation {found['rotation']}, seed {found['seed']}"
    )


def _hessians(found: Mapping[str, Any]) -> str:
    table = _means(found["hessian_means"], COLUMNS, "Hessians")
    paper = [
        (f"QuIP, Table 6, {processing}", "", *(_number(known.get(key)) for key in COLUMNS))
        for processing, known in found["paper"].items()
    ]
    return f"{table}\n\n{_paper(paper)}" if paper else table


def _paper(lines: Sequence[Sequence[str]]) -> str:
    return aligned([("the paper", "", *COLUMNS.values()), *lines])


def _means(means: Sequence[Mapping[str, Any]], columns: Mapping[str, str], of: str) -> str:
    head = ("mean ± standard deviation", of, *columns.values())
    lines = [
        (
            f"{row['role']}, {row['processing']}",
            str(row["count"]),
            *(f"{_number(row[key]['mean'])} ± {_number(row[key]['std'])}" for key in columns),
        )
        for row in means
    ]
    return aligned([head, *lines])


def _number(value: float | None) -> str:
    """Three digits, or what is needed of more."""
    if value is None:
        return "-"
    return (
        f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    )


def _legend(found: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "rank, > 1 %: eigenvalues above n 1.2e-7 and 1 % of the largest, over n",
            f"tr(D)/tr(H): of H damped by {found['percdamp']:g} of its mean diagonal, last column "
            "to first; all else of H undamped",
            "mu_H: max |Q_ij| sqrt(n), eigenvalues not 0",
            "bound: mu_H^2 tr(H^1/2)^2 / (n tr(H)), on tr(D)/tr(H) of H undamped (Lemma 2)",
            "tight bound: max (H^1/2)_ii tr(H^1/2) / tr(H), which the proof of that bound has",
            "mean's share: |E x|^2 / tr(H)",
        ]
    )
