"""Quantize, load and generate again and again in one process, and watch what it holds.

    python scripts/dev/soak.py --out results/soak.json

Claim: after the first few cycles memory, open files, threads and temporary files stay as they are.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from bench_rounding import commit, cpu_name
from tqdm import tqdm

import quip
from quip.cli import main as command
from quip.evaluate.memory import resident_bytes
from quip.files import replacing
from quip.model.load import load_model
from quip.serve.generate import generate
from quip.serve.sampling import Sampling

WARM = 10  # cycles until allocators have what they need
SLACK = 20 << 20  # bytes by which the last may be above the first after that
METHODS = (
    ("--wbits", "2", "--incoh_processing"),
    ("--wbits", "4", "--quant", "gptq", "--groupsize", "64"),
    ("--codebook", "E8P12"),
    ("--codebook", "E8P12RVQ4B"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--cycles", type=int, default=40)
    parser.add_argument("--generations", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        os.environ["TMPDIR"] = work
        tempfile.tempdir = work
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 900)
        rows = [cycle(folder, n) for n in tqdm(range(args.cycles), unit="cycle")]
        checkpoint = load_model(str(folder / "saved"))
        answers = [answer(checkpoint, n) for n in tqdm(range(args.generations), unit="generation")]
    flat = is_flat(rows) and is_flat(answers)
    record = {"kind": "soak", "commit": commit(), "cpu": cpu_name(), "flat": flat, "warm": WARM}
    with replacing(args.out) as partial:
        text = json.dumps({**record, "cycles": rows, "generations": answers}, indent=1)
        partial.write_text(text + "\n")
    print("flat" if flat else "grew", rows[WARM], rows[-1], answers[WARM], answers[-1], sep="\n")
    return int(not flat)


def cycle(folder: Path, number: int) -> dict[str, int]:
    """Quantize, save, load and run a model; what the process holds then."""
    line = ["run", "demo", str(folder / "text.txt"), "--nsamples", "2", "--seqlen", "32"]
    line += ["--eval_datasets", "none", "--save", str(folder / "saved"), "--overwrite"]
    if command([*line, *METHODS[number % len(METHODS)]]):
        raise SystemExit(f"cycle {number} failed")
    model = quip.load(folder / "saved")
    with torch.no_grad():
        model(torch.arange(16)[None])
    return held(folder)


def answer(checkpoint: Any, number: int) -> dict[str, int]:
    """Generate a few tokens; what the process holds then."""
    pieces = generate(
        checkpoint.model,
        checkpoint.tokenizer,
        f"Function number {number}",
        max_new_tokens=8,
        sampling=Sampling(),
        rng=torch.Generator().manual_seed(number),
    )
    if not "".join(pieces):
        raise SystemExit(f"generation {number} said nothing")
    return held(Path(tempfile.gettempdir()))


def held(folder: Path) -> dict[str, int]:
    """Memory, descriptors, threads, and files in the folder for temporary ones."""
    gc.collect()
    return {
        "bytes": resident_bytes(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "files": sum(1 for _ in folder.rglob("*")),
    }


def is_flat(rows: list[dict[str, int]]) -> bool:
    first, last = rows[WARM], rows[-1]
    same = all(first[key] == last[key] for key in ("descriptors", "threads", "files"))
    return same and last["bytes"] - first["bytes"] <= SLACK


if __name__ == "__main__":
    sys.exit(main())
