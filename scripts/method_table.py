"""Quantize one model with many methods, and record what each of them cost.

    python scripts/method_table.py demo pydoc --out results/demo.json

Claim (QuIP, section 5): at 2 bits every baseline collapses and incoherence processing rescues
it, while at 4 bits it costs nothing. One row for each method, bit width and processing; rows
already in the file are kept, so that a stopped run goes on. `render_results.py` puts the
table into the README.
"""

import argparse
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

from bench_rounding import commit

from quip.jobs.run import Experiment, run_experiment
from quip.matrix.build import METHODS, build_recipe

PROCESSING: dict[str, dict[str, Any]] = {
    "baseline": {},
    "incoherence": {"incoh_processing": True},
    "as printed": {"incoh_processing": True, "faithful": True},
}
RANGES: dict[str, dict[str, Any]] = {
    f"{range_}, {f'rho {rho}' if rho else 'best of ten'}": {
        "incoh_processing": True,
        "range_": range_,
        "rho": rho,
    }
    for range_ in ("tensor", "column")
    for rho in (1.7, 2.0, 2.4, None)
}


def main() -> None:
    args = parse_arguments()
    record = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    wanted: list[tuple[str, int, str]] = [("none", 16, "none")]
    processing = RANGES if args.ranges else PROCESSING
    wanted += product(args.quant.split(","), map(int, args.wbits.split(",")), processing)
    done = {(row["quant"], row["wbits"], row["processing"]) for row in record["rows"]}
    for quant, wbits, name in wanted:
        if (quant, wbits, name) in done:
            continue
        report = run_experiment(experiment(args, quant, wbits, processing.get(name)))
        record |= {key: report[key] for key in ("device", "dtype", "versions")}
        record |= {"model": args.name or args.model, "dataset": Path(args.dataset).name}
        record["commit"] = commit()
        record["evaluation"] = [shorten(stamp) for stamp in report["evaluation"].values()]
        record["calibration"] = shorten(report["calibration"]) or record.get("calibration")
        record["rows"].append(row(quant, wbits, name, report))
        write(args.out, record)
        print(json.dumps(record["rows"][-1]), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("dataset", help="calibration text")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, continued if it exists")
    parser.add_argument("--name", help="what to call the model in the table")
    parser.add_argument("--quant", default=",".join(METHODS))
    parser.add_argument("--wbits", default="4,3,2")
    parser.add_argument("--ranges", action="store_true", help="compare --range and --rho instead")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--eval_datasets", default="pydoc")
    parser.add_argument("--eval_nsamples", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    return parser.parse_args()


def experiment(
    args: argparse.Namespace, quant: str, wbits: int, options: dict[str, Any] | None
) -> Experiment:
    recipe = None if options is None else build_recipe(quant=quant, wbits=wbits, **options)
    return Experiment(
        model=args.model,
        dataset=args.dataset,
        recipe=recipe,
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        dtype=args.dtype,
        device=args.device,
        eval_datasets=tuple(args.eval_datasets.split(",")),
        eval_nsamples=args.eval_nsamples,
    )


def row(quant: str, wbits: int, processing: str, report: dict[str, Any]) -> dict[str, Any]:
    totals = report.get("totals", {})
    return {
        "quant": quant,
        "wbits": wbits,
        "processing": processing,
        "perplexity": {Path(k).name: round(v, 4) for k, v in report["perplexity"].items()},
        "bits_per_weight": totals.get("bits_per_weight"),
        "mean_proxy_loss": totals.get("mean_proxy_loss"),
        "seconds": {stage: round(s, 2) for stage, s in report["seconds"].items()},
        "peak_memory": report["peak_memory"],
    }


def shorten(stamp: dict[str, Any] | None) -> dict[str, Any] | None:
    """A stamp without the folders of this machine."""
    return stamp and stamp | {"dataset": Path(stamp["dataset"]).name}


def write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    main()
