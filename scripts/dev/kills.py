"""Kill commands at random moments, repeat or resume them, and compare what they end with.

    python scripts/dev/kills.py --out results/kills.json            (--only run,table)

Claim: wherever kill -9 strikes, the same line (with --resume where there is one) ends with the same
codes, second moments, checkpoint, cells and text, bit for bit, and nothing is left lying about.
What a kill costs is the work that was under way.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attack.cases import TEXT
from attack.children import content
from bench_rounding import commit, cpu_name

from quip.files import replacing

KILLS = 10  # of each kind
SMALL = ("--nsamples", "16", "--seqlen", "128")
FEW = ("--eval_nsamples", "8")
PANEL = """
import torch
from quip.codebooks.grid import RmsGrid
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
X = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
recipe = build_recipe(wbits=2, incoh_processing=True)
found = quantize_matrix(W, (X @ X.T / 256).double(), recipe, rng=torch.Generator().manual_seed(2))
print(found.dequantize().double().numpy().tobytes().hex())
"""


@dataclass(frozen=True)
class Kind:
    """A command, what takes it up again, and what it ends with."""

    name: str
    line: Callable[[Path], list[str]]
    again: tuple[str, ...]  # more words for the second time
    outcome: Callable[[Path, str], Any]  # of the folder and of what was printed


def quip(*words: str) -> list[str]:
    return [sys.executable, "-m", "quip", *words]


def kinds(base: Path) -> Iterator[Kind]:
    """`base` holds a checkpoint, in saved/, and a text to calibrate with."""
    text = str(base / "text.txt")

    def run(folder: Path, method: tuple[str, ...] = ("--incoh_processing",)) -> list[str]:
        places = ("--out", str(folder / "run"), "--save", str(folder / "saved"))
        how = ("--wbits", "2", *method, "--eval_datasets", text)
        return quip("run", "demo", text, *SMALL, *FEW, *places, *how)

    yield Kind("run", run, ("--resume",), of_run)
    vectors = ("--codebook", "vq", "--vq_dim", "2", "--vq_seed", "kpp", "--em_iters", "10")
    yield Kind("vectors", partial(run, method=vectors), ("--resume",), of_run)

    def hessians(folder: Path) -> list[str]:
        return quip("hessians", "demo", text, *SMALL, "--save", str(folder / "store"))

    yield Kind("hessians", hessians, ("--resume",), lambda f, _: files(f / "store"))

    def finetune(folder: Path) -> list[str]:
        places = (str(base / "saved"), text, "--save", str(folder / "tuned"))
        return quip("finetune", *places, *SMALL, "--epochs", "2")

    yield Kind("finetune", finetune, ("--overwrite",), lambda f, _: files(f / "tuned"))

    def table(folder: Path) -> list[str]:
        few = ("--rows", "LDLQ;Near", "--columns", "2 bits", *FEW)
        return quip(
            *("table", "perplexity", "--models", "demo", "--dataset", text),
            *("--eval_datasets", text, *SMALL, *few, "--out", str(folder / "table")),
        )

    yield Kind("table", table, (), of_table)

    def generate(folder: Path) -> list[str]:
        few = ("--max_new_tokens", "60", "--out", str(folder / "answer.json"))
        return quip("generate", str(base / "saved"), "The function", *few)

    yield Kind("generate", generate, ("--overwrite",), of_answer)

    def compile_kernels(folder: Path) -> list[str]:
        return [sys.executable, "-c", PANEL]

    yield Kind("compilation", compile_kernels, (), of_cache)


def of_run(folder: Path, _: str) -> Any:
    """Packed blocks, checkpoint and perplexity."""
    report = json.loads((folder / "run" / "run.json").read_text())
    blocks = files(folder / "run" / "blocks")
    return blocks, files(folder / "saved"), report["perplexity"], report["totals"]


def of_table(folder: Path, _: str) -> Any:
    found = json.loads((folder / "table" / "perplexity.json").read_text())
    return [(x["row"], x["column"], x["measure"], x["ours"]) for x in found["entries"]]


def of_answer(folder: Path, _: str) -> Any:
    found = json.loads((folder / "answer.json").read_text())
    return found["text"]


def of_cache(folder: Path, said: str) -> Any:
    """W_hat, and the names that are left in the cache."""
    return said, sorted(x.name for x in (folder / "cache" / "quip").iterdir())


def files(folder: Path) -> dict[str, str]:
    """The tensors of every file, and the names of all."""
    found = {path.name: content(path) for path in sorted(folder.glob("*.safetensors"))}
    return found | dict.fromkeys((x.name for x in folder.iterdir() if x.name not in found), "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--work", type=Path, default=Path("runs/kills"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", help="kinds, by name")
    args = parser.parse_args()
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    base = work / "base"
    base.mkdir(parents=True)
    (base / "text.txt").write_text(TEXT)
    line = ("run", "demo", str(base / "text.txt"), *SMALL, "--eval_datasets", "none")
    finish(quip(*line, "--wbits", "2", "--save", str(base / "saved")), work)
    rng, rows = random.Random(args.seed), []
    for kind in kinds(base):
        if args.only and kind.name not in args.only.split(","):
            continue
        whole = work / kind.name / "whole"
        seconds, said = finish(kind.line(whole), whole)
        expected = kind.outcome(whole, said)
        number = struck = 0
        while struck < KILLS:
            folder, moment = work / kind.name / str(number), rng.uniform(0.1, 1) * seconds
            number += 1
            if not kill(kind.line(folder), folder, moment):
                continue  # it had ended
            struck += 1
            again, said = finish([*kind.line(folder), *kind.again], folder)
            row = {
                "command": kind.name,
                "commit": commit(),
                "killed_after": moment,
                "resumed_in": again,
                "lost": moment + again - seconds,
                "equal": kind.outcome(folder, said) == expected,
                "left": [str(x.relative_to(folder)) for x in folder.rglob(".*.p*") if x.exists()],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    record = {"kind": "kills", "seed": args.seed, "cpu": cpu_name()}
    with replacing(args.out) as partial:
        partial.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    return int(not all(row["equal"] and not row["left"] for row in rows))


def environment(folder: Path) -> dict[str, str]:
    """With a cache of compiled kernels of its own where compilation is what is killed."""
    own = {"XDG_CACHE_HOME": str(folder / "cache")} if folder.parent.name == "compilation" else {}
    return {**os.environ, **own}


def finish(line: list[str], folder: Path) -> tuple[float, str]:
    """Run to the end: the seconds that took, and what was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        line, env=environment(folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: {done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def kill(line: list[str], folder: Path, moment: float) -> bool:
    """Whether the command and all that it started were killed before they ended."""
    folder.mkdir(parents=True)
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        line, env=environment(folder), stdout=quiet, stderr=quiet, start_new_session=True
    )
    try:
        process.wait(timeout=moment)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


if __name__ == "__main__":
    sys.exit(main())
