"""A thousand requests to `quip serve`, of which clients leave a third, and what it holds after.

    python scripts/dev/soak_server.py --out results/soak_server.json

Claim: memory, descriptors and threads stay as they are, nothing is written for who has left, and
the last answer is the first. On the demo in 2 bits, one by one and with --continuous_batching.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_rounding import commit, cpu_name
from serving import Server, serving

from quip.cli import main as command
from quip.files import replacing

CLIENTS = 8
ROUND = 50  # requests between two looks at the process
WARM = 4  # rounds until allocators have what they need
SLACK = 20 << 20  # bytes by which the last may be above the first after that
PROMPT = {"prompt": "The following function", "max_tokens": 8, "temperature": 0}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--requests", type=int, default=1000, help="a multiple of 50")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 900)
        line = ["run", "demo", str(folder / "text.txt"), "--nsamples", "2", "--seqlen", "32"]
        line += ["--eval_datasets", "none", "--wbits", "2", "--incoh_processing"]
        if command([*line, "--save", str(folder / "saved")]):
            raise SystemExit("the demo could not be quantized")
        model = str(folder / "saved")
        modes = {"one by one": (), "continuous batching": ("--continuous_batching",)}
        parts = {name: soak(model, args.requests, *flags) for name, flags in modes.items()}
    flat = all(is_flat(part["rounds"]) for part in parts.values())
    record = {"kind": "soak_server", "commit": commit(), "cpu": cpu_name(), "flat": flat}
    record |= {"warm": WARM, "round": ROUND, "clients": CLIENTS, "parts": parts}
    with replacing(args.out) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    for name, part in parts.items():
        print(name, part["ended"], part["rounds"][WARM], part["rounds"][-1], sep="\n")
    print("flat" if flat else "grew")
    return int(not flat)


def soak(model: str, requests: int, *flags: str) -> dict[str, Any]:
    """Ask so often, in rounds; what the process holds after each."""
    rng, ended, rounds = random.Random(0), dict[str, int](), []
    with serving(model, *flags, OMP_NUM_THREADS="1") as server, ThreadPoolExecutor(CLIENTS) as pool:
        first = answer(server)
        for _ in range(requests // ROUND):
            kinds = rng.choices(list(KINDS), weights=[3, 2, 2, 1, 1], k=ROUND)
            seeds = [rng.random() for _ in kinds]
            for end in pool.map(lambda kind, seed: KINDS[kind](server, seed), kinds, seeds):
                ended[end] = ended.get(end, 0) + 1
            start = time.perf_counter()
            if answer(server) != first:
                raise SystemExit("the answer has changed")
            rounds.append(held(server) | {"idle_seconds": time.perf_counter() - start})
    return {"ended": ended, "rounds": rounds}


def answer(server: Server) -> str:
    """The greedy text, which waits until all before it has ended or was left."""
    status, text = server.ask(PROMPT)
    if status != 200:
        raise SystemExit(f"{status}: {text}")
    return json.loads(text)["choices"][0]["text"]


def whole(server: Server, seed: float) -> str:
    """Read a whole answer of some length."""
    status, _ = server.ask(words(seed) | {"max_tokens": 1 + int(16 * seed)})
    return f"whole {status}"


def streamed(server: Server, seed: float) -> str:
    """Read a stream to its end."""
    body = words(seed) | {"max_tokens": 1 + int(16 * seed), "stream": True}
    status, text = server.ask(body)
    return f"streamed {status}" if text.endswith("data: [DONE]\n\n") else "cut"


def left_stream(server: Server, seed: float) -> str:
    """Leave a long stream after its first bytes."""
    connection = server.open(words(seed) | {"max_tokens": 450, "stream": True})
    connection.getresponse().read(1 + int(900 * seed))
    connection.close()
    return "stream left"


def left_whole(server: Server, seed: float) -> str:
    """Leave before a long answer comes."""
    connection = server.open(words(seed) | {"max_tokens": 450})
    time.sleep(0.2 * seed)
    connection.close()
    return "answer left"


def refused(server: Server, seed: float) -> str:
    """Ask for what is refused."""
    status, _ = server.ask(words(seed) | {"max_tokens": -1})
    return f"refused {status}"


KINDS = {f.__name__: f for f in (whole, streamed, left_stream, left_whole, refused)}


def words(seed: float) -> dict[str, Any]:
    text = f"Function number {int(1000 * seed)}"
    return {"prompt": text, "temperature": 0.8 if seed < 0.5 else 0}


def held(server: Server) -> dict[str, int]:
    """Memory, descriptors and threads of the process."""
    return {
        "bytes": server.status("VmRSS") * 1024,
        "descriptors": len(os.listdir(f"/proc/{server.pid}/fd")),
        "threads": server.status("Threads"),
    }


def is_flat(rows: list[dict[str, int]]) -> bool:
    """Whether memory stays, and no more descriptors and threads are held than connections need."""
    first, last = rows[WARM], rows[-1]
    same = all(last[key] <= first[key] + 1 for key in ("descriptors", "threads"))
    return same and last["bytes"] - first["bytes"] <= SLACK


if __name__ == "__main__":
    sys.exit(main())
