"""Packed models beside the dense one on this CPU: tokens a second of a prompt and after it.

    python scripts/dev/bench_decoding.py MODEL "4 bits=runs/demo-4bit" ... \\
        --out results/bench_decoding_NAME.json

Models take turns, prompt by prompt, so that what else the machine does meets all of them alike.
With one thread times are CPU seconds, otherwise seconds; medians of prompts and of single tokens.
"""

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from bench_rounding import commit, cpu_name
from transformers import PreTrainedModel

import quip
from quip.model.load import load_model

PROMPT, NEW = 256, 12  # tokens
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on so many threads; ratios are to the dense one."""

    model: str
    threads: int
    prefill: float  # tokens a second
    prefill_ratio: float
    decode: float
    decode_ratio: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the original: a folder, a .gguf file, a hub id, or demo")
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", default="auto", help="of the original")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved prompts of each model")
    parser.add_argument("--out", type=Path, help="JSON file to write; otherwise to stdout")
    args = parser.parse_args()

    loaded = load_model(args.model, dtype=args.dtype)
    models = {DENSE: loaded.model}
    for given in args.checkpoints:
        label, _, folder = given.partition("=")
        models[label] = quip.load(folder)
    rows = [row for count in args.threads for row in bench(models, count, args.repeats)]
    record = {
        "kind": "decoding",
        "model": Path(args.model).stem,
        "dtype": loaded.dtype_name,
        "prompt_tokens": PROMPT,
        "repeats": args.repeats,
        "cpu": cpu_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(record, indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
    print(text, end="")


@torch.no_grad()
def bench(models: Mapping[str, PreTrainedModel], threads: int, repeats: int) -> Iterator[Row]:
    """The models in turns, after one round that is not counted."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            seconds[name].append(seconds_of(model, clock))
    times = {name: [median(x) for x in zip(*s[1:], strict=True)] for name, s in seconds.items()}
    for name, (prefill, decode) in times.items():
        yield Row(
            model=name,
            threads=threads,
            prefill=PROMPT / prefill,
            prefill_ratio=times[DENSE][0] / prefill,
            decode=1 / decode,
            decode_ratio=times[DENSE][1] / decode,
        )


def seconds_of(model: PreTrainedModel, clock: Callable[[], float]) -> tuple[float, float]:
    """Of a prompt of random tokens, and the median of those after it."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, PROMPT), generator=rng)
    cache, times = None, [clock()]
    for _ in range(NEW + 1):
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
        times.append(clock())
    prefill, *decode = [after - before for before, after in itertools.pairwise(times)]
    return prefill, median(decode)


if __name__ == "__main__":
    main()
