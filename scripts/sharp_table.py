"""QuIP# beside QuIP on one model: lattices, the Hadamard transform, and both stages of tuning.

    python scripts/sharp_table.py demo pydoc --out results/sharp_demo.json

Claim (QuIP#, tables 2 and 4): at the same bits E8P beats an integer grid, most of all at 2 bits,
and fine-tuning wins back much of what is lost. One row for each recipe; (b) tunes the checkpoint
of the row before it. Rows already in the file are kept, so that a stopped run goes on.
`render_results.py` puts the table into the README.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench_rounding import commit
from method_table import shorten, write

from quip.jobs.evaluate import Evaluation, run_evaluation
from quip.jobs.finetune import FineTuning, finetune_checkpoint
from quip.jobs.run import Experiment, run_experiment
from quip.matrix.build import build_recipe
from quip.matrix.recipe import Recipe
from quip.model.tune import BlockTuning, ModelTuning


@dataclass(frozen=True)
class Row:
    """What is quantized how, and tuned how."""

    bits: int
    name: str
    flags: dict[str, Any]
    tuned: str = ""  # a: each block, b: the whole model

    @property
    def recipe(self) -> Recipe | None:
        if self.bits == 16:
            return None
        lattice = "codebook" in self.flags
        return build_recipe(**self.flags if lattice else {"wbits": self.bits, **self.flags})


KRONECKER = {"incoh_processing": True}
HADAMARD = {"pre_proj": True, "qfn": "b", "rotation": "hadamard"}  # without rescaling, as lattices
E8P = {"codebook": "E8P12"}
E81B = {"codebook": "E8P12RVQ3B"}
TWICE = {"codebook": "E8P12RVQ4B"}
PUBLISHED = {"faithful": True}


def lattice_rows(bits: int, name: str, flags: dict[str, Any]) -> tuple[Row, ...]:
    return (
        Row(bits, f"{name}, Hadamard, as published", flags | PUBLISHED),
        Row(bits, f"{name}, Hadamard", flags),
        Row(bits, f"{name}, Hadamard, (b)", flags, "b"),
        Row(bits, f"{name}, Hadamard, (a)", flags, "a"),
        Row(bits, f"{name}, Hadamard, (a) and (b)", flags, "ab"),
    )


ROWS = (
    Row(16, "the original", {}),
    Row(2, "int, Kronecker", KRONECKER),
    Row(2, "int, Hadamard", KRONECKER | {"rotation": "hadamard"}),
    Row(2, "int, Hadamard, not rescaled", HADAMARD),
    Row(2, "E8P, Kronecker", E8P | {"rotation": "kronecker"}),
    *lattice_rows(2, "E8P", E8P),
    Row(3, "int, Kronecker", KRONECKER),
    *lattice_rows(3, "E8P and E81B", E81B),
    Row(4, "int, Kronecker", KRONECKER),
    *lattice_rows(4, "E8P twice", TWICE),
)


def main() -> None:
    args = parse_arguments()
    record = json.loads(args.out.read_text()) if args.out.exists() else {"sharp": True, "rows": []}
    done = {(row["bits"], row["name"]) for row in record["rows"]}
    with TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for row in ROWS:
            if (row.bits, row.name) in done or (args.only and row.name not in args.only):
                continue
            tune = tuned_model if "b" in row.tuned else quantized
            made, report = tune(args, row, work)
            record |= {key: report[key] for key in ("device", "dtype", "versions")}
            record |= {"model": args.name or args.model, "commit": commit()}
            record["evaluation"] = [shorten(stamp) for stamp in report["evaluation"].values()]
            record["tuning"] = {
                "nsamples": args.ft_nsamples or args.nsamples,
                "block": vars(block_tuning(args)),
                "model": vars(model_tuning(args)),
            }
            if report.get("calibration"):
                record["calibration"] = shorten(report["calibration"])
            record["rows"].append({"name": row.name, "bits": row.bits, "tuned": row.tuned, **made})
            write(args.out, record)
            print(json.dumps(record["rows"][-1]), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("dataset", help="calibration text")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, continued if it exists")
    parser.add_argument("--work", type=Path, help="where checkpoints are kept")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="rows of this name alone (may be given again)",
    )
    parser.add_argument("--name", help="what to call the model in the table")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--eval_datasets", default="pydoc")
    parser.add_argument("--eval_nsamples", type=int)
    parser.add_argument("--ft_nsamples", type=int, help="windows of (b), if not --nsamples")
    parser.add_argument("--ft_epochs", type=int, default=BlockTuning.epochs)
    parser.add_argument("--ft_lr", type=float, default=BlockTuning.lr)
    parser.add_argument("--ft_batch_size", type=int, default=BlockTuning.batch_size)
    parser.add_argument("--epochs", type=int, default=ModelTuning.epochs, help="of (b)")
    parser.add_argument("--lr", type=float, default=ModelTuning.lr, help="of (b)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    return parser.parse_args()


def block_tuning(args: argparse.Namespace) -> BlockTuning:
    return BlockTuning(
        epochs=args.ft_epochs,
        lr=args.ft_lr,
        signs_lr=10 * args.ft_lr,
        batch_size=args.ft_batch_size,
    )


def model_tuning(args: argparse.Namespace) -> ModelTuning:
    return ModelTuning(epochs=args.epochs, lr=args.lr, signs_lr=10 * args.lr)


def quantized(args: argparse.Namespace, row: Row, work: Path) -> tuple[dict[str, Any], Any]:
    """Quantize, tuning each block if asked to, and keep the checkpoint where (b) may tune it."""
    folder = checkpoint(row, work)
    report = run_experiment(
        Experiment(
            model=args.model,
            dataset=args.dataset,
            recipe=row.recipe,
            tuning=block_tuning(args) if "a" in row.tuned else None,
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            dtype=args.dtype,
            device=args.device,
            eval_datasets=tuple(args.eval_datasets.split(",")),
            eval_nsamples=args.eval_nsamples,
            save=folder,
            overwrite=bool(folder and folder.exists()),
        )
    )
    return summary(report), report


def tuned_model(args: argparse.Namespace, row: Row, work: Path) -> tuple[dict[str, Any], Any]:
    """Tune as a whole the checkpoint that (b) starts from, made now if it is not there."""
    start = replace(row, tuned=row.tuned.removesuffix("b"))
    before, after = checkpoint(start, work), checkpoint(row, work)
    assert before is not None
    assert after is not None
    if not before.exists():
        quantized(args, start, work)
    found = finetune_checkpoint(
        FineTuning(
            checkpoint=before,
            dataset=args.dataset,
            save=after,
            tuning=model_tuning(args),
            teacher=args.model,
            nsamples=args.ft_nsamples or args.nsamples,
            seqlen=args.seqlen,
            device=args.device,
            overwrite=after.exists(),
        )
    )
    report = run_evaluation(
        Evaluation(
            model=str(after if found.improved else before),
            datasets=tuple(args.eval_datasets.split(",")),
            seqlen=args.seqlen,
            nsamples=args.eval_nsamples,
            device=args.device,
        )
    )
    made = {
        "held_out_kl": [found.kl_before, found.kl_after],
        "epochs": found.epochs,
        "seconds": {"tune": round(found.seconds, 2)},
    }
    return {"perplexity": perplexity(report), **made}, report


def checkpoint(row: Row, work: Path) -> Path | None:
    """Where the checkpoint of a row is kept: of lattices by default, which (b) goes on from."""
    if row.flags.keys() != {"codebook"}:
        return None
    return work / f"{row.flags['codebook']}{row.tuned}"


def summary(report: dict[str, Any]) -> dict[str, Any]:
    totals, tuned = report.get("totals", {}), report.get("tuned")
    found = {
        "perplexity": perplexity(report),
        "bits_per_weight": totals.get("bits_per_weight"),
        "mean_proxy_loss": totals.get("mean_proxy_loss"),
        "seconds": {stage: round(s, 2) for stage, s in report["seconds"].items()},
        "peak_memory": report["peak_memory"],
    }
    if tuned:
        ratios = [r["loss_after"] / r["loss_before"] for r in tuned if r["loss_before"]]
        found["held_out_block_loss"] = sum(ratios) / len(ratios)
    return found


def perplexity(report: dict[str, Any]) -> dict[str, float]:
    return {Path(k).name: round(v, 4) for k, v in report["perplexity"].items()}


if __name__ == "__main__":
    main()
