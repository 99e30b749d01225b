"""What quantization buys, in one line and in one table: numbers of results/, nothing typed."""

import textwrap
from collections.abc import Mapping

from measured import Point, load, numbers, points

from quip.jobs.report.text import table

MODEL = "smollm2"


def headline() -> str:
    """The model in 16 bits, and at 4 and 2 bits by the best recipes: megabytes and perplexity."""
    found = _measured()
    four, two, tuned = found["felt", "walk", 4], found["felt", "walk", 2], found["felt", "b", 2]
    return (
        f"**SmolLM2-135M: {_size(16)} → {_size(four.stored)} at 4 bits (perplexity "
        f"{four.original:.2f} → {four.perplexity:.2f}), {_size(two.stored)} at 2 bits "
        f"({two.perplexity:.2f}, fine-tuned {tuned.perplexity:.2f}).**\n"
    )


def demo() -> str:
    """What `make demo` prints, in lines that a page shows whole."""
    record = load("demo_run")
    assert record
    lines = [
        textwrap.fill(
            line,
            96,
            subsequent_indent="      ",
            replace_whitespace=False,
            drop_whitespace=len(line) > 96,
        )
        for line in table(record).splitlines()
    ]
    return "```\n" + "\n".join(lines) + "\n```\n"


def glance() -> str:
    """Methods down, bits across: perplexities, and what the checkpoint takes."""
    found = _measured()
    rows = {
        "nearest": [("baseline", "nearest")],
        "OPTQ": [("baseline", "gptq")],
        "QuIP: LDLQ, incoherence processing": [("incoherence", "ldlq")],
        "QuIP with greedy passes (`ldlqRG`)": [("incoherence", "ldlqRG")],
        "QuIP#: lattice E8": [("lattice", "ldlq")],
        "QuIP#, fine-tuned": [("fine-tuned", "ab"), ("fine-tuned", "b")],
        "QTIP's trellis": [("trellis", "walk")],
        "`--recipe best-4bit`, `best-3bit`, `best-2bit`": [("felt", "walk")],
        "the same, fine-tuned": [("felt", "b")],
    }
    lines = ["| SmolLM2-135M | 4 bits | 3 bits | 2 bits |", "|---|---:|---:|---:|"]
    for name, keys in rows.items():
        cells = [_first(found, keys, bits) for bits in (4, 3, 2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sizes = [_size(found["lattice", "ldlq", bits].stored) for bits in (4, 3, 2)]
    lines.append(f"| *checkpoint of QuIP#* | {' | '.join(f'*{size}*' for size in sizes)} |")
    original = next(iter(found.values())).original
    record = load(f"sharp_{MODEL}")
    assert record
    seen, used = record["evaluation"][0], record["calibration"][0]
    model = record["entries"][0]["model"]
    return "\n".join(lines) + (
        f"\n\nPerplexity of {model} on WikiText-2 ({seen['windows']} windows of "
        f"{seen['seqlen']} tokens), calibrated on {used['windows']} windows of its validation "
        f"text; the original has {original:.2f} and takes {_size(16)}. A dash was not run.\n"
    )


def _measured() -> dict[tuple[str, str, int], Point]:
    """The points that were measured on the tokens of the record of lattices."""
    ours = [p for p in points(tables=False) if p.model == MODEL]
    return {(p.processing, p.method, p.bits): p for p in ours}


def _first(found: dict[tuple[str, str, int], Point], keys: list[tuple[str, str]], bits: int) -> str:
    point = next((found[*key, bits] for key in keys if (*key, bits) in found), None)
    return "-" if point is None else f"{point.perplexity:.2f}"


def _size(bits: float | None) -> str:
    """Megabytes of the tensors of a checkpoint that stores so many bits per quantized weight.

    What is quantized and what stays follow from the two checkpoints of the record that differ
    most in bits: bytes are what stays, and bits / 8 for each quantized weight.
    """
    record = load(f"checkpoints_{MODEL}")
    assert record
    assert bits is not None
    rows = sorted(numbers(record).values(), key=lambda row: row["bits as stored"])
    low, high = rows[0], rows[-1]
    if bits == 16:
        return f"{low['16 bits']:.0f} MB"
    rise = (_reported(high) - _reported(low)) / (high["bits as stored"] - low["bits as stored"])
    return f"{_reported(low) + rise * (bits - low['bits as stored']):.0f} MB"


def _reported(row: Mapping[str, float]) -> float:
    """Megabytes of the tensors: of the file without its header."""
    return row["file, MB"] / (1 + row["file beyond reported, %"] / 100)
