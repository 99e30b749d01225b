"""The README.md of a saved checkpoint: what it is, how to load it, what it costs."""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quip.errors import how_to_install
from quip.jobs.report.text import experts_words, size_words, tables_words

# Where a run worked and what it wrote, none of which the result depends on. Paths among them
# are of one machine, and a card is made to be passed on.
UNSAID = (
    *("model", "dataset", "call", "config", "device"),
    *("out", "save", "load", "overwrite", "resume", "storycloze_csv"),
)
OF_TASKS = ("num_fewshot", "batch_size", "limit")  # of no effect without --tasks
PLAN = "plan.yaml"  # what the file is called here; the card holds what it says
MISSING = "-"


def model_card(report: Mapping[str, Any], *, folder_name: str, has_plot: bool = False) -> str:
    """The card of the checkpoint in a folder of this name, from the report of its run (run.json).

    The report may be of any stage: a section appears when there is something to say, and a dash
    stands for what was not measured. `has_plot`: the folder holds layers.png.
    """
    report = _without_folders(report)
    sections = [
        _front_matter(report),
        f"# {folder_name}",
        _sentence(report),
        _loading(folder_name),
        _sizes(report),
        _perplexities(report),
        _tasks(report.get("tasks") or {}),
        _method(report),
        _versions(report.get("versions") or {}),
    ]
    if has_plot:
        sections.append(
            "## Error of each matrix\n\n![Proxy loss of each matrix by depth](layers.png)"
        )
    return "\n\n".join(filter(None, sections)) + "\n"


def _without_folders(value: Any) -> Any:
    """The value with files and folders of this machine by their last name only."""
    match value:
        case Mapping():
            return {_without_folders(key): _without_folders(x) for key, x in value.items()}
        case list() | tuple():
            return [_without_folders(x) for x in value]
        case Path():
            return _without_folders(str(value))
        case str():
            local = ("/", "./", "../", "~")
            names = value.split(",")
            return ",".join(Path(x).name if x.startswith(local) else x for x in names)
    return value


def _front_matter(report: Mapping[str, Any]) -> str:
    """What the hub reads. A base model is named only where the name can be a hub id."""
    bits = _bits(report)
    words: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quip", "quantized", *([f"{bits}-bit"] if bits else [])],
    }
    if _is_hub_id(model := str(report.get("model") or "")):
        words |= {"base_model": model, "base_model_relation": "quantized"}
    return f"---\n{yaml.safe_dump(words, sort_keys=False, allow_unicode=True)}---"


def _is_hub_id(name: str) -> bool:
    """Whether a name is owner/name, and no file or folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.gguf)", name)) and not Path(name).exists()


def _bits(report: Mapping[str, Any]) -> int | float | None:
    """Bits of a code; None where matrices differ in them."""
    if report.get("plan"):
        return None
    codebook = (report.get("recipe") or {}).get("codebook") or {}
    return codebook.get("bits") or (report.get("flags") or {}).get("wbits")


def _sentence(report: Mapping[str, Any]) -> str:
    model, bits = report.get("model"), _bits(report)
    of = f"`{model}`" if model else "A language model"
    rounded = f"rounded to {bits} bits each" if bits else "quantized"
    return f"{of}, the weight matrices of its blocks {rounded} and packed by quip."


def _loading(name: str) -> str:
    return f"""## Loading

```python
import quip  # before the model is loaded
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

**Without `import quip`, transformers refuses these files, or, where these are old, fills the
quantized layers with random numbers.** `quip.load("{name}")` cannot be got wrong. The package is
`quip-quant`: {how_to_install()}. lm-eval runs by `quip evaluate {name} --tasks TASKS` or
`python -m quip.lm_eval --model hf --model_args pretrained={name} --tasks TASKS`;
`quip export {name} OUT --dense` writes a plain model, which is larger,
for tools that do not import quip."""


def _sizes(report: Mapping[str, Any]) -> str:
    totals, checkpoint = report.get("totals") or {}, report.get("checkpoint") or {}
    rows = []
    if totals:
        bits = _number(totals["bits_per_weight"], ".3f")
        rows += [
            ("bits per weight of the quantized matrices", bits),
            ("quantized matrices", f"{totals['matrices']:,}"),
            ("weights in them", f"{totals['weights']:,}"),
            ("mean proxy loss", _number(totals["mean_proxy_loss"], ".3g")),
        ]
        if "experts" in totals:
            rows.append(("tokens that experts saw", experts_words(totals["experts"])))
    if tables := report.get("tables"):
        rows.append(("bits per weight of embedding and head", tables_words(tables)))
    if checkpoint:
        rows += [
            ("size on disk", size_words(checkpoint["bytes"])),
            ("size of the same weights in 16 bits", size_words(checkpoint["dense_bytes"])),
        ]
    notes = (
        "Bits per weight count all that is stored for a matrix: codes, ranges, rescaling and "
        "rotations. Proxy loss is the share of a matrix's output energy, on calibration data, that "
        "rounding turned into error."
    )
    return f"## Size\n\n{_table(('', ''), rows)}\n\n{notes}" if rows else ""


def _perplexities(report: Mapping[str, Any]) -> str:
    found, original = report.get("perplexity") or {}, report.get("original_perplexity") or {}
    if not found and not original:
        return ""
    stamps, rows = report.get("evaluation") or {}, []
    for name in {**stamps, **original, **found}:
        values = [_number(values.get(name), ".4g") for values in (original, found)]
        rows.append((name, *values, *_stamp(stamps.get(name) or {})))
    heads = ("data set", "original", "quantized", "split", "windows", "tokens in each", "SHA-256")
    note = (
        "The SHA-256 is that of the tokens: numbers compare where it is the same. A dash was not "
        "measured."
    )
    return f"## Perplexity\n\n{_table(heads, rows)}\n\n{note}"


def _stamp(stamp: Mapping[str, Any]) -> tuple[str, ...]:
    words = [str(stamp.get(key, MISSING)) for key in ("split", "windows", "seqlen")]
    return (*words, str(stamp.get("sha256", MISSING))[:8])


def _tasks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, row in tasks.items():
        for metric, value in row.items():
            if metric in ("samples", "version") or metric.endswith("_stderr"):
                continue
            error = row.get(f"{metric}_stderr")
            spread = "" if error is None else f" ± {_number(error, '.3f')}"
            questions = str(row.get("samples", MISSING))
            rows.append((name, metric, _number(value, ".3f") + spread, questions))
    if not rows:
        return ""
    heads = ("task", "metric", "quantized", "samples")
    return f"## Zero-shot tasks\n\n{_table(heads, rows)}"


def _method(report: Mapping[str, Any]) -> str:
    lines = []
    flags = report.get("flags") or {}
    if (report.get("recipe") or report.get("plan")) and (method := report.get("method")):
        seed = report.get("seed")
        lines.append(f"Method: {method}" + (f"; seed {seed}." if seed is not None else "."))
    if stamp := report.get("calibration"):
        split, windows, seqlen, digest = _stamp(stamp)
        text = stamp.get("dataset", MISSING)
        lines.append(
            f"Calibrated on {windows} windows of {seqlen} tokens of {text} "
            f"(split {split}, SHA-256 of the tokens {digest})."
        )
    if tuned := report.get("finetune"):
        before, after = tuned["kl_before"], tuned["kl_after"]
        lines.append(
            "Then fine-tuned (`quip finetune`): its KL divergence from the original, on windows "
            f"held out, went from {before:.4g} to {after:.4g} nats per token"
            f"{', which is within noise' if tuned.get('within_noise') else ''}."
        )
    if line := _command(report):
        lines.append(f"Made with\n\n```\n{line}\n```")
    if plan := flags.get("plan"):
        text = yaml.safe_dump(dict(plan), sort_keys=False, allow_unicode=True)
        lines.append(f"where {PLAN} says\n\n```yaml\n{text}```")
    return "## Method\n\n" + "\n\n".join(lines) if lines else ""


def _command(report: Mapping[str, Any]) -> str:
    """The line that makes the same codes: every value is spelt out, as defaults may change."""
    flags = report.get("flags") or {}
    if not flags or not report.get("model") or not report.get("dataset"):
        return ""
    dataset = [] if flags.get("hessians") else [str(report["dataset"])]
    words = [str(report["model"]), *dataset, *_flags(flags)]
    return "quip run " + " ".join(shlex.quote(word) for word in words)


def _flags(flags: Mapping[str, Any]) -> Iterator[str]:
    unsaid = UNSAID if flags.get("tasks") else (*UNSAID, *OF_TASKS)
    for name, value in flags.items():
        if name in unsaid or value is None or value is False:
            continue
        yield f"--{name}"
        if name == "plan":
            yield PLAN
        elif value is not True:
            yield ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _versions(versions: Mapping[str, str]) -> str:
    return f"## Versions\n\n{', '.join(map(' '.join, versions.items()))}" if versions else ""


def _number(value: Any, form: str) -> str:
    """A number, also one that run.json holds as a word (nan, inf); a dash for none."""
    if value is None:
        return MISSING
    number = float(value)
    return format(number, form) if math.isfinite(number) else str(number)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
