"""Save checkpoints with many methods, load each in a new process, and record what came back.

    python scripts/checkpoint_table.py demo pydoc --out results/checkpoints_demo.json

Claim: what is saved is what was evaluated, in as many bits as reported. For each method and bit
width: the size of the file against the bits that the run reported, memory once loaded, the
perplexity in a new process against that of the run, logits of from_pretrained against those of
quip.load, and tokens per second, each beside the same weights in 16 bits. Rows already in the file
are kept.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_rounding import commit
from method_table import shorten, write

CELLS: list[tuple[str, int, list[str]]] = [
    *(("ldlq, incoherence", bits, ["--quant", "ldlq", "--incoh_processing"]) for bits in (2, 3, 4)),
    ("gptq, groups of 64", 3, ["--quant", "gptq", "--groupsize", "64"]),
    ("nearest", 4, ["--quant", "nearest"]),
    ("ldlqRG, incoherence", 2, ["--quant", "ldlqRG", "--incoh_processing"]),
    ("allbal, incoherence", 3, ["--quant", "allbal", "--incoh_processing"]),
    ("ldlbal_admm, incoherence", 3, ["--quant", "ldlbal_admm", "--incoh_processing"]),
]


def main() -> None:
    args, flags = parse_arguments()
    if args.measure:
        print(json.dumps(memory(args.measure) if args.memory else measure(args.measure)))
        return
    record = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    done = {(row["method"], row["wbits"]) for row in record["rows"]}
    for method, wbits, chosen in CELLS:
        if (method, wbits) in done:
            continue
        name = f"{method}-{wbits}".replace(", ", "-").replace(" ", "-")
        saved, run = args.work / name, args.work / f"{name}-run"
        line = ["-m", "quip.run", args.model, args.dataset, "--wbits", str(wbits), *chosen, *flags]
        python([*line, "--save", str(saved), "--out", str(run), "--resume"])
        python(["-m", "quip", "export", str(saved), f"{saved}-dense", "--dense", *BFLOAT16])
        found = json.loads(python([__file__, "--measure", str(saved)]).splitlines()[-1])
        for key, folder in (("packed_rss", saved), ("dense_rss", f"{saved}-dense")):
            line = [__file__, "--memory", "--measure", str(folder)]
            found[key] = json.loads(python(line).splitlines()[-1])
        record["threads"] = found.pop("threads")
        report = json.loads((run / "run.json").read_text())
        record |= {key: report[key] for key in ("device", "dtype", "versions")}
        record |= {"model": args.name or args.model, "commit": commit(), "checkpoints": True}
        record["evaluation"] = [shorten(stamp) for stamp in report["evaluation"].values()]
        record["rows"].append({"method": method, "wbits": wbits, **found})
        write(args.out, record)
        print(json.dumps(record["rows"][-1]), flush=True)


BFLOAT16 = ["--dtype", "bfloat16", "--overwrite"]


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Ours, and the flags for every `quip run`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("dataset", nargs="?", help="calibration text")
    parser.add_argument("--out", type=Path, help="JSON file, continued if it exists")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where checkpoints go")
    parser.add_argument("--name", help="what to call the model in the table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_known_args()


def python(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def measure(folder: str) -> dict[str, Any]:
    """What a new process finds in a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    import quip
    from quip.jobs.evaluate import Evaluation, run_evaluation
    from quip.jobs.inspect import inspect_checkpoint

    saved = json.loads((Path(folder) / "run.json").read_text())
    held, bits = inspect_checkpoint(folder), saved["totals"]["bits_per_weight"]
    rest = held["bytes_by_kind"]["bias"] + held["bytes_by_kind"]["other"]
    ours, theirs = quip.load(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(200).unsqueeze(0) + 100
    with torch.no_grad():
        equal = torch.equal(ours(ids).logits, theirs(ids).logits)
    written = theirs.generate(ids[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    del ours, theirs
    report = run_evaluation(Evaluation(model=folder))
    speed = run_evaluation(Evaluation(model=folder, speed=True))["speed"]
    return {
        "perplexity": {Path(k).name: round(v, 4) for k, v in report["perplexity"].items()},
        "perplexity_equal": report["perplexity"] == saved["perplexity"],
        "logits_equal": equal,
        "generated": written.shape[1] - 8,
        "file_bytes": held["file_bytes"],
        "reported_bytes": round(bits * held["quantized_weights"] / 8) + rest,
        "dense_bytes": saved["checkpoint"]["dense_bytes"],
        "bits_per_weight": held["bits_per_weight"],
        "reported_bits_per_weight": bits,
        "threads": torch.get_num_threads(),
        "speed": speed,
    }


def memory(folder: str) -> int:
    """Bytes by which loading the model raises the resident memory."""
    import torch
    from transformers import AutoModelForCausalLM, OPTForCausalLM  # noqa: F401

    import quip.packed.hub  # noqa: F401

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    before = resident()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.arange(8).unsqueeze(0) + 100)
    return resident() - before


if __name__ == "__main__":
    main()
