"""Put the tables of results/ into README.md and docs/, between the markers that name them.

    python scripts/dev/render_results.py        (--check: change nothing, exit 1 if one is stale)
    python scripts/dev/render_results.py --add runs/tables/range.json table_range_demo

A block `<!-- table NAME -->` up to `<!-- end -->` holds results/NAME.json, rendered as its `kind`
says; `<!-- table tables -->` what each table of `quip table` takes. No number is typed by hand;
what was not run is a dash. --add keeps what `quip table` or `quip run --out` has written.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attack.children import FAULTS
from bench_rounding import commit, cpu_name
from blocks import ROOT, fill
from gpu_tables import of_gpu
from scale_tables import of_forecast, of_forecasts, of_simulations
from serving_tables import of_serving, of_soak_server

from quip.jobs.report.folder import as_json
from quip.jobs.report.text import table
from quip.research.tables.description import read_table, table_names
from quip.research.tables.rendering import command, markdown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    parser.add_argument(
        "--add", nargs=2, metavar=("FILE", "NAME"), help="keep it in results/ first"
    )
    args = parser.parse_args()
    if args.add:
        add(Path(args.add[0]), args.add[1])
    stale = fill("table", render, check=args.check)
    print("stale: " + ", ".join(stale) if stale else "all tables are up to date")
    return int(args.check and bool(stale))


def add(file: Path, name: str) -> None:
    """A record with where it was made; run.json, which says no kind, is that of a run."""
    record = {"kind": "run", **json.loads(file.read_text())}
    made = {"commit": commit(), "cpu": cpu_name()}
    (ROOT / "results" / f"{name}.json").write_text(as_json({**record, **made}))


def render(name: str) -> str:
    """What stands between the markers of this name."""
    if name == "tables":
        return costs()
    path = ROOT / "results" / f"{name}.json"
    if not path.exists():
        return "(not run)\n"
    record = json.loads(path.read_text())
    return RENDERERS[record["kind"]](record)


def costs() -> str:
    """Every table that the package describes: where it is from, and what it takes."""
    lines = ["| table | what | from | cost |", "|---|---|---|---|"]
    for one in map(read_table, table_names()):
        lines.append(f"| `quip table {one.name}` | {one.title} | {one.source} | {one.cost} |")
    return "\n".join(lines) + "\n"


def of_table(record: Mapping[str, Any]) -> str:
    """As `quip table` shows it, without its headings, and with the line that makes it."""
    minutes = f" {record['seconds'] / 60:.0f} minutes" if record.get("seconds") else ""
    words = [record.get(key) for key in ("cpu", "dtype")]
    if threads := record.get("threads"):
        words.append(f"{threads} thread" + "s" * (threads != 1))
    if record.get("commit"):
        words.append(f"commit {record['commit']}")
    where = f" ({', '.join(filter(None, words))})" if any(words) else ""
    made = record.get("command") or command(record)
    return markdown(record).split("\n\n", 2)[2] + f"\n`{made}`:{minutes}{where}.\n"


def of_run(record: Mapping[str, Any]) -> str:
    """What `quip run` prints."""
    return f"```\n{table(record)}\n```\n"


def of_rounding(record: Mapping[str, Any]) -> str:
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


def of_kills(record: Mapping[str, Any]) -> str:
    """How often each command was killed, and what that cost."""
    lines = [
        "| command | kills | end equal | left over | lost at most |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row["command"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["command"] == name]
        equal, left = (sum(bool(row[x]) for row in rows) for x in ("equal", "left"))
        lost = max(row["lost"] for row in rows)
        lines.append(f"| {name} | {len(rows)} | {equal} | {left} | {lost:.1f} s |")
    commits = dict.fromkeys(row["commit"] for row in record["rows"])
    return "\n".join(lines) + (
        "\n\nOn `demo`; what is lost holds a second start of the process "
        f"({record['cpu']}, commit {', '.join(commits)}).\n"
    )


def of_fuzz(record: Mapping[str, Any]) -> str:
    """How so many attacks on each kind of thing ended."""
    verdicts = ("equal", "done", "refused", *FAULTS)
    lines = [
        "| attacked | cases | " + " | ".join(verdicts) + " |",
        "|---|---:|" + "---:|" * len(verdicts),
    ]
    for kind, counts in record["counts"].items():
        cells = [str(counts.get(verdict, 0)) for verdict in verdicts]
        lines.append(f"| {kind} | {sum(counts.values())} | {' | '.join(cells)} |")
    return "\n".join(lines) + (
        f"\n\nAt most {record['most_seconds']:.1f} s of processor time and "
        f"{record['most_bytes'] / 1e6:.0f} MB ({record['cpu']}, commit {record['commit']}).\n"
    )


def of_soak(record: Mapping[str, Any]) -> str:
    """What one process held after its first cycles and after its last."""
    lines = [
        "| | cycles | memory | descriptors | threads | files |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for what in ("cycles", "generations"):
        rows = record[what]
        for number in (record["warm"], len(rows) - 1):
            row = rows[number]
            lines.append(
                f"| {what} | {number + 1} | {row['bytes'] / 1e6:.0f} MB | {row['descriptors']} "
                f"| {row['threads']} | {row['files']} |"
            )
    return "\n".join(lines) + "\n"


def of_search(record: Mapping[str, Any]) -> str:
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


def of_em(record: Mapping[str, Any]) -> str:
    """Learned centroids: assignments and iterations of EM beside the published form."""
    lines = [
        "| together | bits | centroids | group | published form | native | ratio "
        "| an iteration, published | native | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['dim']} | {r['bits']} | {r['centroids']} | {r['group']:,} "
        f"| {r['published_ns']:,.0f} ns | {r['ns']:.1f} ns "
        f"| {r['ratio']:.0f}{'' if r['met'] else ' (missed)'} "
        f"| {r['published_iteration_ns']:,.0f} ns | {r['iteration_ns']:.1f} ns "
        f"| {r['iteration_ratio']:.0f} |"
        for r in record["rows"]
    ]
    m, n = record["matrix"]
    differ = max(1 - r["equal_codes"] for r in record["rows"])
    equal = f"at most {1e6 * differ:.0f} in a million codes differ" if differ else "equal codes"
    return "\n".join(lines) + (
        f"\n\nPer vector, {record['threads']} thread, {m} x {n} weights, {equal}, {record['cpu']}. "
        f"EM of 28,672 rows at 2D 4 bits takes {math.ceil(record['peak_mib']['cpu'])} MiB beside "
        f"weights and centroids, {record['peak_mib']['torch']:.0f} MiB without a compiler.\n"
    )


def of_vq(record: Mapping[str, Any]) -> str:
    """Learned codebooks: the time of a block beside scalar LDLQ, and memory."""
    lines = [
        "| m x n | in a block | 2D, 2.125 bits | LDLQ + IncP, 2 bits | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['m']} x {r['n']} | {r['count']} | {r['learned_ms']:.0f} ms "
        f"| {r['scalar_ms']:.0f} ms | {r['ratio']:.1f} |"
        for r in record["rows"]
    ]
    block, memory = record["block"], record["memory"]
    missed = ["" if one["met"] else " (missed)" for one in (block, memory)]
    lines.append(
        f"| a block | {sum(r['count'] for r in record['rows'])} | {block['learned_ms']:.0f} ms "
        f"| {block['scalar_ms']:.0f} ms | {block['ratio']:.1f}{missed[0]} |"
    )
    return "\n".join(lines) + (
        f"\n\nWith factorisations, {record['threads']} thread, {record['cpu']}. A matrix of "
        f"{memory['m']} x {memory['n']} takes {memory['peak_mib']:.0f} MiB beside its "
        f"{memory['weights_mib']:.0f} MiB of float32 weights and what H was factorised into: "
        f"{memory['ratio']:.1f} times as much{missed[1]}.\n"
    )


def of_decoding(record: Mapping[str, Any]) -> str:
    """Packed models beside the dense one."""
    lines = [
        f"| {record['model']} | threads | prefill, tokens/s | of dense "
        "| decode, tokens/s | of dense |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['model']} | {r['threads']} | {r['prefill']:,.0f} | {r['prefill_ratio']:.2f} "
        f"| {r['decode']:,.1f} | {r['decode_ratio']:.2f} |"
        for r in record["rows"]
    ]
    return "\n".join(lines) + (
        f"\n\nOne text, a prompt of {record['prompt_tokens']} tokens, {record['dtype']}, models in "
        f"turns, CPU seconds where threads are 1; {record['cpu']}, commit {record['commit']}.\n"
    )


def of_blocks(record: Mapping[str, Any]) -> str:
    """Blocks of a Hadamard rotation beside the whole width, model by model."""
    lines = [
        "| model | codes | block | bits as stored | mean proxy loss | perplexity | KL, nats |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    notes = []
    for name, model in record["models"].items():
        lines.append(f"| {name} | original | | | | {model['original']:.2f} | |")
        lines += [
            f"| {name} | {r['code']} | {r['block'] or 'whole'} | {r['bits_per_weight']:.2f} "
            f"| {r['mean_proxy_loss']:.5f} | {r['perplexity']:.2f} | {r['kl']:.4f} |"
            for r in model["rows"]
        ]
        notes.append(
            f"{name}: calibrated on {model['calibration_windows']} windows, measured on "
            f"{model['windows']}, of {model['seqlen']} tokens ({model['dtype']}, {model['cpu']}, "
            f"commit {model['commit']})."
        )
    return "\n".join([*lines, "", *notes]) + "\n"


def of_trellis(record: Mapping[str, Any]) -> str:
    """Squared errors of trellis codes: a line for bits and states, a column for each code."""
    rows = {(r["bits"], r["states"], r["code"]): r for r in record["rows"]}
    codes = list(dict.fromkeys(r["code"] for r in record["rows"]))
    lines = [
        "| bits | no code has less | states | " + " | ".join(codes) + " |",
        "|---:|---:|---:|" + "---:|" * len(codes),
    ]
    for bits, states in dict.fromkeys(sorted(key[:2] for key in rows)):
        found = [rows.get((bits, states, name)) for name in codes]
        cells = [f"{r['mse']:#.3g}{'' if r['met'] else ' (missed)'}" if r else "-" for r in found]
        least = f"{4.0**-bits:#.3g}"
        lines.append(f"| {bits:g} | {least} | 2^{states} | {' | '.join(cells)} |")
    errors = [
        max(r["error"] / r["mse"] for r in record["rows"] if (r["states"] > 12) == large)
        for large in (False, True)
    ]
    return "\n".join(lines) + (
        f"\n\nMean squared error of Gaussian weights in circles of {record['weights']}, beside "
        f"their mean square: {record['circles']:,} circles up to 2^12 states and "
        f"{record['large']:,} above, the same for all codes. Standard errors are up to "
        f"{errors[0]:.1%} and {errors[1]:.1%} of the value (commit {record['commit']}).\n"
    )


def of_trellis_speed(record: Mapping[str, Any]) -> str:
    """What rounding to trellis codes takes: a line for bits and states."""
    lines = [
        "| states | bits | a column in a call | columns of a panel | of a greedy pass |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| 2^{r['states']} | {r['bits']} "
        f"| {r['encode_us']:.2f} µs{'' if r['met'] else ' (missed)'} "
        f"| {r['panel_us']:.2f} µs | {r['greedy_us']:.2f} µs |"
        for r in record["rows"]
    ]
    return "\n".join(lines) + (
        f"\n\nPer weight, tiles of {record['weights']}, {record['threads']} thread, "
        f"{record['cpu']}, commit {record['commit']}.\n"
    )


def of_trellis_decoding(record: Mapping[str, Any]) -> str:
    """What products with trellis codes and lattices take: a line for a shape."""
    names = list(record["rows"][0]["ns"])
    lines = [f"| outputs x inputs | {' | '.join(names)} |", "|---:" * (len(names) + 1) + "|"]
    for row in record["rows"]:
        ns, least = row["ns"], row["ns"]["E8P12"]
        cells = [f"{ns[name]:.3f} ns ({ns[name] / least:.2f})" for name in names]
        lines.append(f"| {row['outputs']} x {row['inputs']} | {' | '.join(cells)} |")
    return "\n".join(lines) + (
        f"\n\nPer weight, in parentheses beside E8P12, for one vector: {record['threads']} thread, "
        f"{record['cpu']}, commit {record['commit']}. "
        f"The aim at 2 bits was at most {record['most']}.\n"
    )


RENDERERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "table": of_table,
    "run": of_run,
    "rounding": of_rounding,
    "search": of_search,
    "em": of_em,
    "vq": of_vq,
    "decoding": of_decoding,
    "kills": of_kills,
    "fuzz": of_fuzz,
    "soak": of_soak,
    "soak_server": of_soak_server,
    "serving": of_serving,
    "gpu": of_gpu,
    "forecasts": of_forecasts,
    "forecast": of_forecast,
    "simulations": of_simulations,
    "hadamard_block": of_blocks,
    "trellis_mse": of_trellis,
    "trellis_speed": of_trellis_speed,
    "trellis_decoding": of_trellis_decoding,
}

if __name__ == "__main__":
    sys.exit(main())
