"""A model of the sizes of a large one, but of few blocks, through the pipeline that streams models.

    python scripts/simulate_scale.py llama-2-70b /tmp --blocks 2 --nsamples 16 --seqlen 128

writes files of random weights as large as the blocks of the original, runs `quip run --stream on`
on them in a process of its own, and removes them. It prints the most anonymous memory of that
process (the pages of mapped files are the system's to drop), the bytes that it read from and wrote
to the disk, and the seconds of each stage; and what these come to for all blocks of the original.
With --shrink N widths are an N-th, and for the original have to be extrapolated by their powers.
With --beside_memory the same line runs once more on the model in memory, and what both saved is
compared tensor by tensor.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from quip.jobs.report.forecast import time_words
from quip.jobs.report.text import size_words
from quip.model.load import load_model
from quip.packed.digests import digests_of

INDEX = "model.safetensors.index.json"
PAUSE = 0.05  # seconds between two looks at the process
# The number of blocks is that of the original; fewer are made.
SIZES: dict[str, tuple[type[PretrainedConfig], dict[str, int]]] = {
    "llama-2-70b": (
        LlamaConfig,
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 80,
        },
    ),
    "llama-3b": (  # 24 blocks of 6 GB in 16 bits
        LlamaConfig,
        {
            "hidden_size": 3072,
            "intermediate_size": 9216,
            "num_attention_heads": 24,
            "num_key_value_heads": 24,
            "num_hidden_layers": 24,
        },
    ),
    "llama-4096": (  # as much in 24 blocks of the hub's commonest width; no matrix is much wider
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 4736,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "num_hidden_layers": 24,
        },
    ),
    "mixtral-8x7b": (
        MixtralConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
}
NARROWED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Watched:
    """What a process took."""

    anonymous: int  # bytes of memory at most that no file backs
    read: int  # bytes from the disk
    written: int  # bytes to the disk
    seconds: float


def simulate(
    name: str,
    folder: Path,
    *,
    blocks: int,
    shrink: int,
    vocabulary: int,
    beside_memory: bool,
    line: list[str],
) -> dict[str, Any]:
    """Build the model, run on it, and say what that took. What was written is removed."""
    kind, sizes = SIZES[name]
    narrow = {key: max(1, sizes[key] // shrink) for key in NARROWED}
    config = kind(
        **{**sizes, **narrow, "num_hidden_layers": blocks},
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        architectures=[f"{kind.__name__.removesuffix('Config')}ForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="simulated-", dir=folder))
    try:
        written = write_model(place / "model", config)
        streamed = run(place, "on", line)
        report = json.loads((place / "on" / "run.json").read_text())
        found = outcome(name, config, sizes["num_hidden_layers"], written, streamed, report)
        if beside_memory:
            held = run(place, "off", line)
            found["in_memory"] = {
                "anonymous_bytes": held.anonymous,
                "wall_seconds": held.seconds,
                "seconds": json.loads((place / "off" / "run.json").read_text())["seconds"],
                "equal": digest(place / "saved-on") == digest(place / "saved-off"),
            }
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return found


def run(place: Path, stream: str, line: list[str]) -> Watched:
    """`quip run` on the model of a folder, streamed or not, into folders beside it."""
    words = ["run", str(place / "model"), "pydoc", "--stream", stream, "--dtype", "bfloat16"]
    words += ["--out", str(place / stream), "--save", str(place / f"saved-{stream}"), *line]
    return watch([sys.executable, "-m", "quip", *words])


def digest(folder: Path) -> dict[str, str]:
    """The digest of each tensor of a checkpoint, by its name, whatever file holds it."""
    found = dict[str, str]()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= digests_of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def outcome(
    name: str,
    config: PretrainedConfig,
    all_blocks: int,
    written: int,
    watched: Watched,
    report: dict[str, Any],
) -> dict[str, Any]:
    """The measurement, and what it comes to for all blocks of the original."""
    seconds, blocks = report["seconds"], config.num_hidden_layers
    times = dict.fromkeys(seconds, all_blocks / blocks) | {"data": 1.0}
    times["replay"] = (all_blocks - 1) / max(1, blocks - 1)  # the last block is not
    ways = {stage: s * times[stage] for stage, s in seconds.items()}
    return {
        "model": name,
        "config": {key: getattr(config, key) for key in (*NARROWED, "num_hidden_layers")},
        "flags": {k: report["flags"].get(k) for k in ("wbits", "quant", "nsamples", "seqlen")},
        "bits_per_weight": report["totals"]["bits_per_weight"],
        "block_bytes": written // blocks,
        "anonymous_bytes": watched.anonymous,
        "runtime_bytes": runtime_bytes(),
        "read_bytes": watched.read,
        "written_bytes": watched.written,
        "seconds": seconds,
        "wall_seconds": watched.seconds,
        "seconds_per_block": sum(ways.values()) / all_blocks,
        "all_blocks": all_blocks,
        "extrapolated_seconds": sum(ways.values()),
        "extrapolated_bytes": written // blocks * all_blocks,
    }


def write_model(folder: Path, config: PretrainedConfig) -> int:
    """A folder as of the hub: a file for each block, one of the rest. Returns the blocks' bytes."""
    folder.mkdir()
    config.save_pretrained(folder)
    load_model("demo").tokenizer.save_pretrained(folder)
    rng, places, total = torch.Generator().manual_seed(0), dict[str, str](), 0
    h, vocabulary = config.hidden_size, config.vocab_size
    rest = {
        "model.embed_tokens.weight": (vocabulary, h),
        "model.norm.weight": (h,),
        "lm_head.weight": (vocabulary, h),
    }
    files = [dict(block(index, config)) for index in range(config.num_hidden_layers)]
    for number, shapes in enumerate([rest, *files]):
        file = f"model-{number:05d}-of-{len(files) + 1:05d}.safetensors"
        save_file({name: drawn(shape, rng) for name, shape in shapes.items()}, folder / file)
        places |= dict.fromkeys(shapes, file)
        total += (folder / file).stat().st_size if number else 0
    index = {"metadata": {}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    return total


def block(index: int, config: PretrainedConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a block by the names of the hub."""
    prefix, h, f = f"model.layers.{index}", config.hidden_size, config.intermediate_size
    kv = h // config.num_attention_heads * config.num_key_value_heads
    yield from ((f"{prefix}.{name}.weight", (h,)) for name in NORMS)
    for name, m in {"q": h, "k": kv, "v": kv, "o": h}.items():
        yield f"{prefix}.self_attn.{name}_proj.weight", (m, h)
    if not (experts := getattr(config, "num_local_experts", 0)):
        for name, shape in {"gate": (f, h), "up": (f, h), "down": (h, f)}.items():
            yield f"{prefix}.mlp.{name}_proj.weight", shape
        return
    yield f"{prefix}.block_sparse_moe.gate.weight", (experts, h)
    for expert in range(experts):
        for name, shape in {"w1": (f, h), "w3": (f, h), "w2": (h, f)}.items():
            yield f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight", shape


NORMS = ("input_layernorm", "post_attention_layernorm")


def drawn(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Weights as large as they are at the start of training; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=rng)


def watch(line: list[str]) -> Watched:
    """Run a program, and look at it until it ends. Raises RuntimeError where it fails."""
    start, anonymous, io = time.perf_counter(), 0, {"read_bytes": 0, "write_bytes": 0}
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            anonymous = max(anonymous, numbers_of(process.pid, "status").get("RssAnon", 0))
            io |= numbers_of(process.pid, "io")
            time.sleep(PAUSE)
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} failed with status {process.returncode}")
    seconds = time.perf_counter() - start
    return Watched(1024 * anonymous, io["read_bytes"], io["write_bytes"], seconds)


def numbers_of(pid: int, file: str) -> dict[str, int]:
    """The numbers in /proc/PID/FILE by name; none once the process has ended."""
    try:
        rows = [line.split() for line in Path(f"/proc/{pid}/{file}").read_text().splitlines()]
    except OSError:
        return {}
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def runtime_bytes() -> int:
    """Anonymous memory of a process that has loaded torch, transformers and quip, and no model."""
    code = "import os, quip.jobs.run; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    return 1024 * int(rows["RssAnon"].split()[0])


def words(found: dict[str, Any]) -> str:
    """The outcome for a person."""
    config, blocks = found["config"], found["config"]["num_hidden_layers"]
    stages = ", ".join(f"{k} {time_words(s)}" for k, s in found["seconds"].items())
    beside = size_words(found["anonymous_bytes"] - found["runtime_bytes"])
    held = found.get("in_memory")
    return "\n".join(
        [
            f"{found['model']}, width {config['hidden_size']}, {blocks} of {found['all_blocks']} "
            f"blocks of {size_words(found['block_bytes'])}: {found['bits_per_weight']:.3f} bits",
            f"anonymous memory: {size_words(found['anonymous_bytes'])} at most, {beside} beside "
            f"the runtime's {size_words(found['runtime_bytes'])}",
            f"disk: {size_words(found['read_bytes'])} read, "
            f"{size_words(found['written_bytes'])} written",
            f"time: {time_words(found['wall_seconds'])} ({stages})",
            f"all {found['all_blocks']} blocks, extrapolated: "
            f"{size_words(found['extrapolated_bytes'])}, "
            f"{time_words(found['extrapolated_seconds'])}",
            *([in_memory_words(held)] if held else []),
        ]
    )


def in_memory_words(held: dict[str, Any]) -> str:
    """The same run on the model in memory, for a person."""
    stages = ", ".join(f"{k} {time_words(s)}" for k, s in held["seconds"].items())
    return (
        f"in memory: {size_words(held['anonymous_bytes'])} at most, "
        f"{time_words(held['wall_seconds'])} ({stages}); "
        f"what it saved is {'equal bit for bit' if held['equal'] else 'NOT equal'}"
    )


def main(argv: list[str] | None = None) -> None:
    """Read the line, simulate, print; what is not known here are flags of `quip run`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model", choices=sorted(SIZES))
    add("folder", type=Path, help="where there is room for the blocks, twice")
    add("--blocks", type=int, default=2)
    add("--shrink", type=int, default=1, metavar="N", help="widths are an N-th")
    add("--vocabulary", type=int, default=32000)
    add("--beside_memory", action="store_true", help="and the same of the model in memory")
    add("--json", action="store_true", help="everything that was measured, for programs")
    args, line = parser.parse_known_args(argv)
    line = line or ["--wbits", "2", "--quant", "nearest", "--nsamples", "16", "--seqlen", "128"]
    found = simulate(
        args.model,
        args.folder,
        blocks=args.blocks,
        shrink=args.shrink,
        vocabulary=args.vocabulary,
        beside_memory=args.beside_memory,
        line=[*line, "--eval_datasets", "none"],
    )
    print(json.dumps(found, indent=2) if args.json else words(found))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
