"""Kill a run at random moments, take it up again, and compare what it ends with.

    python scripts/dev/kill_and_resume.py demo pydoc --out results/resume_demo.json \\
        --wbits 2 --incoh_processing

Claim: wherever kill -9 strikes, `--resume` ends with the same codes, checkpoint and perplexity, bit
for bit. What a kill costs is the unfinished block and a second start, or the unfinished
evaluation. Other flags go to `quip run`.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_rounding import commit

from quip.files import replacing

KILLS = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("dataset", help="calibration text")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--work", type=Path, default=Path("runs/kills"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, flags = parser.parse_known_args()
    line = [sys.executable, "-m", "quip.run", args.model, args.dataset, *flags]
    shutil.rmtree(args.work, ignore_errors=True)
    whole = args.work / "whole"
    seconds = finish(line, whole)
    expected = outcome(whole)
    rng, rows = random.Random(args.seed), []
    for number in range(KILLS):
        rows.append(killed(line, args.work / str(number), rng.uniform(0.1, 1) * seconds))
        rows[-1] |= {
            "lost": rows[-1]["killed_after"] + rows[-1]["resumed_in"] - seconds,
            "equal": outcome(args.work / str(number)) == expected,
        }
        print(json.dumps(rows[-1]), flush=True)
    record = {
        "kind": "kills",
        "kills": KILLS,
        "model": args.model,
        "flags": flags,
        "commit": commit(),
    }
    with replacing(args.out) as partial:
        partial.write_text(
            json.dumps({**record, "seconds": seconds, "rows": rows}, indent=1) + "\n"
        )


def finish(line: list[str], folder: Path, *more: str) -> float:
    """Run to the end; the seconds that took."""
    start = time.perf_counter()
    places = ["--out", str(folder / "run"), "--save", str(folder / "saved")]
    subprocess.run([*line, *places, *more], check=True, capture_output=True)
    return time.perf_counter() - start


def killed(line: list[str], folder: Path, moment: float) -> dict[str, Any]:
    """Kill the run after so many seconds, and take it up."""
    places = ["--out", str(folder / "run"), "--save", str(folder / "saved")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*line, *places], **quiet)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    report = folder / "run" / "run.json"
    reached = json.loads(report.read_text())["status"] if report.exists() else "not started"
    blocks = len(list((folder / "run" / "blocks").glob("block-*.safetensors")))
    again = finish(line, folder, "--resume")
    return {"killed_after": moment, "status": reached, "blocks": blocks, "resumed_in": again}


def outcome(folder: Path) -> tuple[Any, ...]:
    """What a run ends with: packed blocks, checkpoint and perplexity."""
    blocks = {p.name: tensors(p) for p in (folder / "run" / "blocks").glob("block-*")}
    report = json.loads((folder / "run" / "run.json").read_text())
    weights = (folder / "saved" / "model.safetensors").read_bytes()
    return blocks, weights, report["perplexity"], report["totals"]


def tensors(path: Path) -> bytes:
    """A file of a block without its header, which holds seconds."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


if __name__ == "__main__":
    main()
