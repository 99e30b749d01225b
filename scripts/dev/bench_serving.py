"""Tokens a second of `quip serve` at 1, 4 and 16 clients, of a model and of what is packed of it.

    python scripts/dev/bench_serving.py MODEL "2 bits=runs/demo-2bit" ... \\
        --out results/serving_NAME.json

All servers run at once and take turns, round by round, so that what else the machine does meets
all of them alike; the best of the rounds counts. Memory is the most that a server ever held.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_rounding import commit, cpu_name
from serving import Server, serving

CLIENTS = (1, 4, 16)
PROMPT = "The history of the city begins with a small settlement near the river, where "
DENSE = "dense"
MODES = {"one by one": (), "together": ("--continuous_batching",)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in one mode: new tokens a second of all clients, and bytes."""

    model: str
    mode: str
    tokens_per_second: dict[str, float]  # by the number of clients
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the original: a folder, a .gguf file, a hub id, or demo")
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--tokens", type=int, default=24, help="new ones of each request")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="what all of them compute in")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    models = {DENSE: args.model} | dict(given.split("=", 1) for given in args.checkpoints)
    rows = [
        Row(mode=mode, **words)
        for mode in args.modes
        for words in bench(models, (*MODES[mode], "--dtype", args.dtype), args.tokens, args.rounds)
    ]
    record = {
        "kind": "serving",
        "model": Path(args.model).stem,
        "dtype": args.dtype,
        "load": os.getloadavg()[1],
        "prompt": PROMPT,
        "new_tokens": args.tokens,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["rows"], indent=1))


def bench(
    models: dict[str, str], flags: tuple[str, ...], tokens: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Every model in a server with these flags: what a row says of it."""
    with ExitStack() as stack:
        servers = {
            label: stack.enter_context(serving(model, *flags)) for label, model in models.items()
        }
        for server in servers.values():
            rate(server, 1, tokens)
        best = {label: dict.fromkeys(map(str, CLIENTS), 0.0) for label in models}
        for _ in range(rounds):
            for clients in CLIENTS:
                for label, server in servers.items():
                    found = rate(server, clients, tokens)
                    best[label][str(clients)] = max(best[label][str(clients)], found)
        for label, server in servers.items():
            peak = server.status("VmHWM") * 1024
            yield {"model": label, "tokens_per_second": best[label], "peak_bytes": peak}


def rate(server: Server, clients: int, tokens: int) -> float:
    """New tokens a second of so many clients, who ask once each, for texts of their own."""

    def ask(number: int) -> int:
        words = {"prompt": f"{number}. {PROMPT}", "max_tokens": tokens, "temperature": 1}
        status, text = server.ask(words)
        if status != 200:
            raise SystemExit(f"{status}: {text}")
        return json.loads(text)["usage"]["completion_tokens"]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(ask, range(clients)))
    return total / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
