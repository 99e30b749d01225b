"""What blocks of a Hadamard rotation cost: proxy loss, perplexity and KL beside the whole width.

    python scripts/dev/hadamard_block.py --model demo --text pydoc --blocks 64 16
    python scripts/dev/hadamard_block.py --model M.gguf --text valid.txt --test test.txt \\
        --blocks 64 --nsamples 16 --seqlen 1024 --eval_nsamples 24 --dtype bfloat16

Adds the model's rows to results/hadamard_block.json. Checkpoints are kept in --folder, and not made
again. All of a model's are measured together, on dense matrices: the original is run once.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench_rounding import commit, cpu_name
from blocks import ROOT
from torch import Tensor, nn

from quip.jobs.evaluate import token_sets
from quip.model.load import load_model
from quip.model.tune.kl import kl_terms
from quip.packed.checkpoint import to_dense

RECORD = ROOT / "results/hadamard_block.json"
CODES = {
    "E8P12": ["--codebook", "E8P12"],
    "int 2": ["--wbits", "2", "--quant", "ldlq", "--incoh_processing", "--rotation", "hadamard"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="to calibrate on")
    parser.add_argument("--test", help="to measure on (default: the text)")
    parser.add_argument("--blocks", type=int, nargs="+", required=True)
    parser.add_argument("--codes", nargs="+", default=list(CODES), choices=list(CODES))
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--eval_nsamples", type=int)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/hadamard_block")
    args = parser.parse_args()

    rows = [{"code": c, "block": b} for c in args.codes for b in (None, *args.blocks)]
    reports = [quantized(args, row["code"], row["block"]) for row in rows]
    original = load_model(args.model, dtype=args.dtype, seqlen=args.seqlen)
    names = (args.test or args.text,)
    (tokens,) = token_sets(
        names, original, seqlen=args.seqlen, nsamples=args.eval_nsamples
    ).values()
    loaded = [load_model(str(report / "checkpoint"), dtype=args.dtype) for report in reports]
    models = [to_dense(one.model) for one in loaded]
    found = measured(original.model, models, tokens.ids)
    for row, report, numbers in zip(rows, reports, found[1:], strict=True):
        totals = json.loads((report / "run.json").read_text())["totals"]
        row |= {k: totals[k] for k in ("bits_per_weight", "mean_proxy_loss")} | numbers
    keep(
        Path(args.model).stem.partition(".")[0],
        {
            "original": found[0]["perplexity"],
            "rows": rows,
            "windows": len(tokens.ids),
            "seqlen": tokens.ids.shape[1],
            "calibration_windows": args.nsamples,
            "dtype": original.dtype_name,
            "commit": commit(),
            "cpu": cpu_name(),
        },
    )


def quantized(args: argparse.Namespace, code: str, block: int | None) -> Path:
    """The folder of a run and of its checkpoint, made unless they are there."""
    name = f"{Path(args.model).stem}-{code.replace(' ', '')}-{block or 'whole'}"
    folder = args.folder / name
    flags = [*CODES[code], "--nsamples", str(args.nsamples), "--dtype", args.dtype]
    flags += ["--seqlen", str(args.seqlen)] if args.seqlen else []
    flags += ["--hadamard_block", str(block)] if block else []
    if not (folder / "checkpoint").exists():
        command = [sys.executable, "-m", "quip", "run", args.model, args.text, *flags]
        places = ["--out", str(folder), "--save", str(folder / "checkpoint"), "--overwrite"]
        subprocess.run([*command, "--eval_datasets", "none", *places], check=True)
    return folder


@torch.inference_mode()
def measured(original: nn.Module, models: list[Any], windows: Tensor) -> list[dict[str, float]]:
    """Perplexity of the original and of each model, and its KL divergence from the original."""
    losses = torch.zeros(1 + len(models), dtype=torch.float64)
    moved = torch.zeros_like(losses)
    for window in windows:
        ids = window[None]
        p = logits(original, ids)
        for i, q in enumerate([p, *(logits(model, ids) for model in models)]):
            losses[i] += nn.functional.cross_entropy(q, window[1:])
            moved[i] += kl_terms(p, q).sum(-1).mean()
    losses, moved = losses / len(windows), moved / len(windows)
    return [
        {"perplexity": math.exp(loss), "kl": float(kl)}
        for loss, kl in zip(losses.tolist(), moved.tolist(), strict=True)
    ]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Those that predict the tokens of a window from the second one on, in float32."""
    return model(input_ids=ids, use_cache=False).logits[0, :-1].float()


def keep(model: str, found: dict[str, Any]) -> None:
    """Put a model's rows into the record."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"models": {}}
    record["kind"] = "hadamard_block"
    record["models"][model] = found
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
