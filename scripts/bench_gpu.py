"""What the kernels do on a CUDA GPU: right or wrong, and how fast. Writes results/gpu.json.

    python scripts/bench_gpu.py --minutes 4               (--only panel --out FILE: a part of it)

A section is a program of its own, scripts/dev/gpu/SECTION.py, that prints a row as a line of JSON
as soon as it has measured it: one that hangs or dies costs its own rows alone. What tells right
from wrong comes first. Needs torch and nvcc, and nothing that only other tests need. A section that
is run anew takes the place of what the record held of it once it has a row; others stay, each with
its commit.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# Shares of the time, in the order of the run; a section that is not named here comes last.
SHARES = {"forms": 4, "model": 4, "panel": 2, "hessian": 1, "matvec": 2, "block": 4, "decode": 3}
FOUND = sorted(p.stem for p in (ROOT / "scripts/dev/gpu").glob("[a-z]*.py"))
SECTIONS = sorted(FOUND, key=lambda name: [*SHARES, name].index(name))
NEEDED = ("transformers", "safetensors", "jaxtyping", "tqdm", "wrapt", "xxhash", "yaml", "pytest")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4, help="for all sections together")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--out", type=Path, help="results/gpu.json; of a dry run, nothing")
    parser.add_argument("--device", default="cuda", help="cpu: a dry run at tiny sizes")
    parser.add_argument("--commit", default=commit(), help="where there is no checkout to ask")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench_gpu: torch sees no CUDA device; say --device cpu for a dry run", file=sys.stderr
        )
        return 2
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"bench_gpu: missing packages: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    out = args.out or (ROOT / "results/gpu.json" if args.device == "cuda" else Path(os.devnull))
    record, endings = described(args.device, out), []
    until = time.monotonic() + 60 * args.minutes
    for index, name in enumerate(args.only):
        section: dict[str, Any] = {"commit": args.commit, "rows": []}
        started = time.monotonic()
        shares = [SHARES.get(other, 1) for other in args.only[index:]]
        limit = (until - started) * shares[0] / sum(shares)
        with closing(rows(name, args.device, limit, section)) as found:
            for row in found:
                section["rows"].append(row)
                record["sections"][name] = section
                print(f"{name}: {json.dumps(row)}", flush=True)
                out.write_text(json.dumps(record, indent=2) + "\n")
        section["seconds"] = round(time.monotonic() - started, 1)
        endings.append(section["ended"])
        print(f"{name}: {section['ended']} after {section['seconds']} s", flush=True)
        out.write_text(json.dumps(record, indent=2) + "\n")
    return int(any(ended != "done" for ended in endings))


def rows(name: str, device: str, seconds: float, section: dict[str, Any]):
    """The rows of a section as they come; section["ended"] says how it ended.

    Its program ends with it, also where an interruption (Ctrl-C) does not reach that.
    """
    section["ended"] = "running"
    command = [sys.executable, str(ROOT / f"scripts/dev/gpu/{name}.py"), "--device", device]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):  # and nothing that a library says
                    yield json.loads(line)
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
    ended = "done" if status == 0 else f"failed with status {status}"
    section["ended"] = f"stopped at its limit of {seconds:.0f} s" if late.is_set() else ended


def described(device: str, out: Path) -> dict[str, Any]:
    """The record before any row: on what it is made, with what it held of the same machine."""
    on_gpu = device == "cuda"
    found: dict[str, Any] = {
        "kind": "gpu",
        "device": torch.cuda.get_device_name() if on_gpu else "CPU (dry run, tiny sizes)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if on_gpu else None,
        },
        "sections": {},
    }
    before = json.loads(out.read_text()) if out.is_file() else {}
    if all(before.get(key) == found[key] for key in ("kind", "device")):
        found["sections"] = before["sections"]
    return found


def commit() -> str | None:
    """The commit of the checkout, marked if it has changes; None outside one."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
