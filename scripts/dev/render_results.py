"""Put the tables of results/ into the README, between the markers that name them.

    python scripts/dev/render_results.py        (--check: fail if the README is out of date)

No number in the README is typed by hand; what was not run is a dash.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from quip.jobs.report.text import size_words, table
from quip.research.tables.rendering import markdown

ROOT = Path(__file__).parents[2]
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PROCESSING = ("baseline", "incoherence", "as printed")
COLUMNS = [(wbits, processing) for wbits in (4, 3, 2) for processing in PROCESSING]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text()
        after = MARKED.sub(lambda m: m[1] + render(m[2]) + m[3], before)
        if after != before:
            stale.append(path.name)
            if not check:
                path.write_text(after)
    print("stale: " + ", ".join(stale) if stale else "all tables are up to date")
    return int(check and bool(stale))


def render(name: str) -> str:
    path = ROOT / "results" / f"{name}.json"
    if not path.exists():
        return "(not run)\n"
    record = json.loads(path.read_text())
    if "entries" in record:
        return markdown(record).split("\n\n", 2)[2]  # the document has its own headings
    if "losses" in record:
        return loss_table(record)
    if "status" in record:
        return f"```\n{table(record)}\n```\n"
    if "sharp" in record:
        return sharp_table(record)
    if "decode_ns" in record:
        return search_table(record)
    if "claim" in record:
        return rounding_table(record)
    if "kills" in record:
        return resume_table(record)
    if "checkpoints" in record:
        return checkpoint_table(record)
    methods = {row["quant"] for row in record["rows"]} - {"none"}
    return (method_table if len(methods) > 1 else range_table)(record) + caption(record)


def loss_table(record: dict[str, Any]) -> str:
    """Mean relative proxy loss: methods down; bits across, without and with processing."""
    cells = {(r["quant"], r["wbits"], r["processing"]): r for r in record["losses"]}
    methods = dict.fromkeys(r["quant"] for r in record["losses"])
    known = dict.fromkeys(r["processing"] for r in record["losses"])
    columns = [(bits, name) for name in known for bits in (4, 3, 2)]
    lines = [
        "| | " + " | ".join(f"{bits} bits, {name}" for bits, name in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for method in methods:
        found = (cells.get((method, *column)) for column in columns)
        words = [f"{r['mean_proxy_loss']:.5f}" if r else "-" for r in found]
        lines.append(f"| `{method}` | {' | '.join(words)} |")
    count, on = record["losses"][0]["matrices"], record["calibration"]
    return "\n".join(lines) + (
        f"\n\nMean over {count} matrices of {record['model']}, on Hessians of the original model "
        f"({on['windows']} windows of {on['seqlen']} tokens of {on['dataset']}, "
        f"{record['dtype']}); {record['seconds'] / 60:.0f} minutes on one busy core.\n"
    )


def method_table(record: dict[str, Any]) -> str:
    """Perplexity of each method (rows) at each bit width and processing (columns)."""
    cells = {(r["quant"], r["wbits"], r["processing"]): r for r in record["rows"]}
    methods = dict.fromkeys(r["quant"] for r in record["rows"] if r["quant"] != "none")
    lines = [
        "| | " + " | ".join(f"{wbits} bits, {processing}" for wbits, processing in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for method in methods:
        row = [number(cells.get((method, *column))) for column in COLUMNS]
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def range_table(record: dict[str, Any]) -> str:
    """Perplexity of one method: what the range is fitted to (rows) at each bit width."""
    cells = {(r["quant"], r["wbits"], r["processing"]): r for r in record["rows"]}
    (method,) = {r["quant"] for r in record["rows"]} - {"none"}
    widths = sorted({wbits for _, wbits, _ in cells} - {16}, reverse=True)
    lines = [f"| range of `{method}` | " + " | ".join(f"{w} bits" for w in widths) + " |"]
    lines.append("|---|" + "---:|" * len(widths))
    for name in dict.fromkeys(p for _, _, p in cells if p != "none"):
        row = [number(cells.get((method, wbits, name))) for wbits in widths]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def caption(record: dict[str, Any]) -> str:
    """What the perplexities of a table were measured on."""
    seen, used = record["evaluation"][0], record["calibration"]
    original = next((r for r in record["rows"] if r["quant"] == "none"), None)
    return (
        f"\nPerplexity of {record['model']} on {seen['dataset']} ({seen['windows']} windows of "
        f"{seen['seqlen']} tokens, SHA-256 {seen['sha256'][:8]}), calibrated on {used['windows']} "
        f"windows of {used['dataset']}, in {record['dtype']}; the original has {number(original)}. "
        "A dash was not run.\n"
    )


def rounding_table(record: dict[str, Any]) -> str:
    """Ours against each loop: time, ratio and the share of torch's matrix product rate."""
    lines = [
        "| m x n | range | against | ours | loop | ratio | GFLOP/s | of torch's product |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['m']} x {r['n']} | {r['range']} | {r['peer']} | {r['ours_ms']:.1f} ms "
        f"| {r['peer_ms']:.0f} ms | {r['ratio']:.1f}{'' if r['met'] else ' (missed)'} "
        f"| {r['gflops']:.0f} | {r['share']:.0%} |"
        for r in record["rows"]
    ]
    caption = f"One thread, {record['bits']} bits, {record['dtype']}, {record['cpu']}."
    return "\n".join([*lines, "", caption]) + "\n"


def checkpoint_table(record: dict[str, Any]) -> str:
    """What each checkpoint takes and gives, beside the same weights in 16 bits."""
    lines = [
        "| method | bits | as stored | file / reported | file / 16 bits | memory / 16 bits "
        "| perplexity | in a new process | prefill | decode |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for r in record["rows"]:
        packed, dense = r["speed"]["packed"], r["speed"]["dense"]
        rates = (f"{k}_tokens_per_second" for k in ("prefill", "decode"))
        prefill, decode = (f"{packed[k]:.0f} / {dense[k]:.0f}" for k in rates)
        back = "equal" if r["perplexity_equal"] and r["logits_equal"] else "differs"
        lines.append(
            f"| {r['method']} | {r['wbits']} | {r['bits_per_weight']:.3f} "
            f"| {r['file_bytes'] / r['reported_bytes'] - 1:+.2%} "
            f"| {size_words(r['file_bytes'])} / {size_words(r['dense_bytes'])} "
            f"| {size_words(r['packed_rss'])} / {size_words(r['dense_rss'])} "
            f"| {number(r)} | {back} | {prefill} | {decode} |"
        )
    seen, threads = record["evaluation"][0], record.get("threads")
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {record['dtype']}, {threads} thread on a shared machine; "
        f"perplexity on {seen['dataset']} ({seen['windows']} windows of {seen['seqlen']} tokens, "
        f"SHA-256 {seen['sha256'][:8]}). Memory is what loading adds to the resident size, in 16 "
        "bits that of the exported dense model; prefill and decode are tokens per second, packed / "
        "dense.\n"
    )


def resume_table(record: dict[str, Any]) -> str:
    """Each kill, and what it cost."""
    lines = [
        "| killed after | in | finished blocks | resumed in | lost | ends |",
        "|---:|---|---:|---:|---:|---|",
    ]
    lines += [
        f"| {r['killed_after']:.1f} s | {r['status']} | {r['blocks']} | {r['resumed_in']:.1f} s "
        f"| {r['lost']:.1f} s | {'equal' if r['equal'] else 'differs'} |"
        for r in sorted(record["rows"], key=lambda r: r["killed_after"])
    ]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, `{' '.join(record['flags'])}`; a run that nothing interrupts "
        f"takes {record['seconds']:.1f} s. What is lost holds a second start of the process.\n"
    )


def sharp_table(record: dict[str, Any]) -> str:
    """Each recipe: what is stored, what is lost, and the time it took."""
    lines = [
        "| bits | recipe | as stored | mean proxy loss | perplexity | minutes |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for r in record["rows"]:
        stored, loss = r.get("bits_per_weight"), r.get("mean_proxy_loss")
        seconds = sum(s for stage, s in r["seconds"].items() if stage != "evaluate")
        lines.append(
            f"| {r['bits']} | {r['name']} "
            f"| {f'{stored:.3f}' if stored else '-'} | {f'{loss:.4f}' if loss else '-'} "
            f"| {number(r)} | {seconds / 60:.1f} |"
        )
    seen, used, tuning = record["evaluation"][0], record["calibration"], record["tuning"]
    block, model = tuning["block"], tuning["model"]
    return "\n".join(lines) + (
        f"\n\n{record['model']} on {seen['dataset']} ({seen['windows']} windows of "
        f"{seen['seqlen']} tokens, SHA-256 {seen['sha256'][:8]}), calibrated on {used['windows']} "
        f"windows of {used['dataset']}, in {record['dtype']} on a shared machine. (a): "
        f"{block['epochs']} epochs at {block['lr']:g}, signs {block['signs_lr']:g}; (b): "
        f"{model['epochs']} epochs at {model['lr']:g}, signs {model['signs_lr']:g}, on "
        f"{tuning['nsamples']} windows; a quarter of the windows is held out. Minutes of (b) are "
        "those of its tuning alone.\n"
    )


def search_table(record: dict[str, Any]) -> str:
    """Nearest points: each form beside the dense search."""
    lines = [
        "| codebook | search in torch | closed form in torch | native | native / search |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = {(r["codebook"], r["form"]): r for r in record["rows"]}
    for name in dict.fromkeys(r["codebook"] for r in record["rows"]):
        forms = [rows.get((name, form)) for form in ("search", "torch", "compiled")]
        times = [
            f"{r['ns']:.0f} ns" if r and r["ns"] >= 100 else f"{r['ns']:.1f} ns" if r else "-"
            for r in forms
        ]
        ratio = f"{forms[2]['ratio']:.0f}" if forms[2] else "-"
        lines.append(f"| {name} | {' | '.join(times)} | {ratio} |")
    equal = (
        "equal codes" if all(r["equal_codes"] == 1 for r in record["rows"]) else "codes that differ"
    )
    return "\n".join(lines) + (
        f"\n\nPer vector of eight weights, {record['threads']} thread, {record['vectors']} "
        f"Gaussian vectors, {equal}, {record['cpu']}. The tables take "
        f"{record['table_bytes'] / 1e3:.0f} kB, and {record['tables_ms']:.0f} ms when they are "
        "first used.\n"
    )


def number(row: dict[str, Any] | None) -> str:
    """The perplexity of a row with four digits, or a dash."""
    if row is None:
        return "-"
    value = next(iter(row["perplexity"].values()))
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e5 else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
