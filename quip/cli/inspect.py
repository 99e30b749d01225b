"""`quip inspect DIR`: what a checkpoint holds and takes; weights are only read to verify them."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quip.cli.output import aligned
from quip.cli.streams import say
from quip.errors import Unavailable, shown
from quip.jobs.report.text import size_words

HELP = "show what a saved checkpoint holds and takes"
EXAMPLES = """
quip inspect runs/demo-2bit
quip inspect runs/demo-2bit --json
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a folder written by `quip run ... --save DIR`")
    add("--json", action="store_true", help="print everything that is known, as JSON")
    add(
        "--verify",
        action="store_true",
        help="read all tensors and compare them with the digests that they were saved with; exits "
        "with 1 if any is damaged",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="write the proxy loss of each matrix along depth to this file, as PNG",
    )
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> None:
    """Inspect, plot, and print."""
    from quip.jobs.inspect import inspect_checkpoint, matrix_records
    from quip.jobs.report.plots import check_plots, plot_losses

    if args.plot:
        check_plots("--plot")
    found = inspect_checkpoint(args.folder, verify_tensors=args.verify)
    if args.plot:
        plot_losses(matrix_records(args.folder), args.plot)
    say(json.dumps(found, indent=2, allow_nan=False) if args.json else inspection_table(found))
    if args.verify and (damaged := found["verification"]["damaged"]):
        raise Unavailable(
            f"{args.folder}: {damaged} of its tensors {'is' if damaged == 1 else 'are'} not what "
            "was saved; download or save it again"
        )


def inspection_table(found: Mapping[str, Any]) -> str:
    """What `inspect_checkpoint` found, in a few lines for a person."""
    parts = [
        _heading(found),
        _sizes(found),
        _verification(found["verification"]),
        _specs_table(found.get("specs", ())),
        aligned([("stored as", "bytes"), *_counts(found["bytes_by_kind"])]),
        _perplexity_table(found["perplexities"]),
        _worst_table(found["worst_matrices"]),
    ]
    if found["plot"]:
        parts.append(f"proxy losses along depth: {Path(found['folder']) / found['plot']}")
    return "\n\n".join(filter(None, [*parts, *(f"note: {note}" for note in found["notes"])]))


def _heading(found: Mapping[str, Any]) -> str:
    of = found["architecture"]
    lines = [
        found["folder"],
        f"{of['class']} ({of['model_type']}): {of['blocks']} blocks, hidden size "
        f"{of['hidden_size']}, vocabulary {of['vocab_size']}",
    ]
    if found["base_model"]:
        lines.append(f"made from {found['base_model']}: {found['method']}")
    if tuned := found["finetune"]:
        lines.append(
            f"then fine-tuned: KL divergence {tuned['kl_before']:.4g}, now {tuned['kl_after']:.4g} "
            "nats per token (proxy losses are those before)"
        )
    return "\n".join(lines)


def _tables(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Embedding and head, where they are packed, apart from the matrices of blocks."""
    if "bits_per_weight_of_tables" not in found:
        return []
    tables, blocks = (found[f"bits_per_weight_of_{of}"] for of in ("tables", "blocks"))
    return [("of these", f"{tables:.3f} in embedding and head, {blocks:.3f} in the blocks")]


def _sizes(found: Mapping[str, Any]) -> str:
    size = {key: size_words(found[f"{key}_bytes"]) for key in ("file", "header", "memory", "dense")}
    rows = [
        (
            "quantized",
            f"{found['quantized_matrices']} matrices, {found['quantized_weights']:,} of "
            f"{found['weights']:,} weights",
        ),
        (
            "bits per weight",
            f"{found['bits_per_weight']:.3f} in these matrices, "
            f"{found['bits_per_weight_of_all']:.3f} over all weights",
        ),
        *_tables(found),
        ("on disk", f"{size['file']}, of which headers {size['header']}"),
        ("in memory", f"{size['memory']} to compute in {found['dtype']}"),
        ("dense", f"{size['dense']} in 16 bits"),
    ]
    return "\n".join(f"{name:<17}{words}" for name, words in rows)


def _verification(found: Mapping[str, Any] | None) -> str:
    """What became of the tensors, where they were verified: the damaged ones each on its line."""
    if found is None:
        return ""
    whole = found["tensors"] - found["damaged"]
    lines = [f"{whole} of {found['tensors']} tensors with digests are what was saved"]
    lines += [f"damaged: {shown(name)}" for name in found["damaged_tensors"]]
    if more := found["damaged"] - len(found["damaged_tensors"]):
        lines.append(f"and {more} more")
    return "\n".join([*lines, *(f"no digests: {name}" for name in found["unsigned"])])


def _specs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The specifications of the matrices, where there are several."""
    lines = [
        (
            ", ".join(_words(part) for part in (row["codebook"], *row["transforms"])),
            f"{row['quantized_matrices']}",
            f"{row['quantized_weights']:,}",
            f"{row['bits_per_weight']:.3f}",
        )
        for row in rows
    ]
    return aligned([("quantized as", "matrices", "weights", "bits"), *lines]) if lines else ""


def _words(part: Mapping[str, Any]) -> str:
    return " ".join([part["kind"], *(f"{k}={v}" for k, v in part.items() if k != "kind")])


def _counts(sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(kind, f"{size:,}") for kind, size in sizes.items()]


def _perplexity_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("perplexity", "original", "quantized", "windows", "tokens each", "SHA-256")
    lines = [
        (
            row["dataset"],
            *(_short(row[key]) for key in ("original", "quantized")),
            *(str(row.get(key, "-")) for key in ("windows", "seqlen")),
            str(row.get("sha256", "-"))[:8],
        )
        for row in rows
    ]
    return aligned([heads, *lines]) if lines else ""


def _worst_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        (
            row["name"],
            f"{row['rows']} x {row['columns']}",
            f"{row['bits_per_weight']:.3f}",
            _short(row["proxy_loss"]),
        )
        for row in rows
    ]
    return aligned([("worst matrices", "shape", "bits", "proxy loss"), *lines]) if lines else ""


def _short(value: float | str | None) -> str:
    return "-" if value is None else f"{float(value):.4g}"
