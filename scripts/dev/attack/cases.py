"""Damaged checkpoints, stores, ledgers and run folders, and what is done with them."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attack import mutations
from attack.children import Child, command, content, run_all

TEXT = " ".join(f"The {n} quick brown foxes jump over {n * n} lazy dogs." for n in range(400))
SMALL = ("--nsamples", "2", "--seqlen", "32", "--eval_datasets", "none", "--device", "cpu")
METHODS = {
    "int": ("--wbits", "2", "--incoh_processing"),
    "groups": ("--wbits", "3", "--quant", "gptq", "--groupsize", "64"),
    "lattice": ("--codebook", "E8P12"),
    "vectors": (
        *("--codebook", "vq", "--wbits", "2", "--vq_dim", "2", "--em_iters", "5"),
        *("--quant", "gptq", "--vq_scaling", "64"),
    ),
}
OF_BYTES = (
    *(mutations.flip, mutations.flip, mutations.flip, mutations.cut, mutations.lengthen),
    *(mutations.blank, mutations.swap, mutations.remove, mutations.replace, mutations.exchange),
)


@dataclass(frozen=True)
class Target:
    """A folder that is damaged in one of its files, and what is done with it then."""

    kind: str
    folder: Path
    files: Sequence[str]  # patterns
    damages: Callable[[Path], Sequence[mutations.Damage]]  # of a file
    acts: Sequence[Callable[[Path], Any]]


def mutated(work: Path, count: int, seed: int) -> Iterator[Child]:
    """The cases, each of a generator of its own: case N is the same however many there are."""
    targets = list(_targets(work / "base"))
    expected: dict[tuple[int, int], Any] = {}
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        which = rng.randrange(len(targets))
        target = targets[which]
        how = rng.randrange(len(target.acts))
        if (which, how) not in expected:
            expected[which, how] = _undamaged(target, how, work / f"whole-{which}-{how}")
        files = sorted(x for p in target.files for x in target.folder.glob(p) if x.is_file())
        file = rng.choice(files).relative_to(target.folder)
        damage = rng.choice(target.damages(file))
        trial = work / "trial" / str(number)
        what = f"{target.kind}: {file} {_named(damage)}, {_named(target.acts[how])}"
        yield Child(
            kind=target.kind,
            what=what,
            folder=trial,
            prepare=partial(_damage, target.folder, file, damage, rng),
            act=target.acts[how],
            expected=expected[which, how],
        )


def _named(call: Any) -> str:
    return getattr(call, "__name__", None) or _named(call.func)


def _damage(
    base: Path, file: Path, damage: mutations.Damage, rng: random.Random, trial: Path
) -> None:
    shutil.copytree(base, trial / "it")
    (trial / "damage").write_text(damage(trial / "it" / file, rng))


def _undamaged(target: Target, how: int, trial: Path) -> Any:
    """What the act comes to without damage, in a process of its own."""

    def prepare(folder: Path) -> None:
        shutil.copytree(target.folder, folder / "it")

    value: list[Any] = []
    child = Child("", "", trial, prepare, target.acts[how], keep=True)
    for _, ended in run_all([child]):
        if ended["verdict"] != "done":
            raise SystemExit("\n".join(["without damage:", *ended["said"]]))
        value.append(json.loads((trial / "value.json").read_text()))
    shutil.rmtree(trial)
    return value[0]


def _targets(base: Path) -> Iterator[Target]:
    base.mkdir(parents=True)
    (base / "text.txt").write_text(TEXT)
    text = str(base / "text.txt")
    for name, flags in METHODS.items():
        places = ("--out", str(base / name / "run"), "--save", str(base / name / "saved"))
        _quip("run", "demo", text, *flags, *SMALL, *places)
        saved = base / name / "saved"
        yield Target("checkpoint", saved, ("*.safetensors",), _of_weights, LOADS)
        yield Target("checkpoint", saved, ("config.json",), _of_config, LOADS)
        run = base / name / "run"
        run.joinpath("blocks/block-0002.safetensors").unlink()
        resume = partial(_resume, text, flags)
        yield Target("ledger", run, ("blocks/*.safetensors",), _of_weights, (resume,))
        yield Target("ledger", run, ("blocks/*.json",), _of_json, (resume,))
        yield Target("run folder", run, ("run.json", "layers.*"), _of_json, (resume,))
    store = base / "store"
    _quip("hessians", "demo", text, *SMALL[:4], "--save", str(store), "--device", "cpu")
    uses = (_run_from, _take_up_store(text), _summarize)
    yield Target("store", store, ("manifest.json",), _of_json, uses)
    yield Target("store", store, ("*.safetensors",), _of_weights, uses)


def _quip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "quip", *words], check=True, capture_output=True)


def _of_weights(file: Path) -> Sequence[mutations.Damage]:
    return (*OF_BYTES, mutations.header, mutations.header)


def _of_config(file: Path) -> Sequence[mutations.Damage]:
    ours = mutations.json_of("quantization_config")
    return (ours, ours, ours, ours, mutations.cut, mutations.remove, mutations.replace)


def _of_json(file: Path) -> Sequence[mutations.Damage]:
    words = (mutations.json_of(),) * 6 if file.suffix == ".json" else ()
    return (*OF_BYTES, *words)


def _load(trial: Path) -> str:
    """quip.load, and its logits."""
    import quip
    from quip.errors import QuipError

    try:
        return _answer(quip.load(trial / "it"))
    except QuipError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from error


def _from_pretrained(trial: Path) -> str:
    from transformers import AutoModelForCausalLM

    import quip  # noqa: F401

    try:
        return _answer(AutoModelForCausalLM.from_pretrained(trial / "it"))
    except Exception as error:  # transformers has errors of its own, which are no lines
        print(" ".join(str(error).split())[:500], file=sys.stderr)
        raise SystemExit(1) from error


def _answer(model: Any) -> str:
    with torch.no_grad():
        logits = model(torch.arange(16)[None]).logits
    return logits.double().numpy().tobytes().hex()[:4096] + str(logits.double().sum().item())


def _verify(trial: Path) -> bool:
    command("inspect", str(trial / "it"), "--verify")
    return True


def _evaluate(trial: Path) -> str:
    (trial / "text.txt").write_text(TEXT)
    few = ("--nsamples", "2", "--seqlen", "32", "--device", "cpu")
    command("evaluate", str(trial / "it"), "--datasets", str(trial / "text.txt"), *few)
    return next(x for x in (trial / "stdout").read_text().splitlines() if "perplexity" in x)


def _generate(trial: Path) -> str:
    command("generate", str(trial / "it"), "The", "--max_new_tokens", "4", "--device", "cpu")
    return (trial / "stdout").read_text()


LOADS = (_load, _from_pretrained, _verify, _evaluate, _generate)


def _resume(text: str, flags: Sequence[str], trial: Path) -> str:
    places = ("--out", str(trial / "it"), "--save", str(trial / "saved"), "--resume")
    command("run", "demo", text, *flags, *SMALL, *places)
    return content(trial / "saved" / "model.safetensors")


def _run_from(trial: Path) -> str:
    flags = ("--hessians", str(trial / "it"), *METHODS["int"], *SMALL[4:])
    command("run", "demo", *flags, "--save", str(trial / "saved"))
    return content(trial / "saved" / "model.safetensors")


def _take_up_store(text: str) -> Callable[[Path], str]:
    def act(trial: Path) -> str:
        line = ("hessians", "demo", text, *SMALL[:4], "--device", "cpu", "--resume")
        command(*line, "--save", str(trial / "it"))
        return _run_from(trial)

    return act


def _summarize(trial: Path) -> str:
    command("summary", str(trial / "it"), "--out", str(trial / "summary"))
    return (trial / "summary" / "hessians.csv").read_text()
