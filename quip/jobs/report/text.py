"""The result of a run in a few lines for a person."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def table(report: Mapping[str, Any]) -> str:
    """The result in a few lines for a person."""
    lines = [f"{report['model']}  {report['method']}"]
    if totals := report.get("totals"):
        lines.append(
            f"{totals['matrices']} matrices at {totals['bits_per_weight']:.3f} bits per weight, "
            f"mean proxy loss {totals['mean_proxy_loss']:.3g}"
        )
        if (plain := totals.get("mean_plain_loss")) is not None:
            lines[-1] += f" of weighted tokens, {plain:.3g} of all alike"
        if experts := totals.get("experts"):
            lines.append(f"experts saw {experts_words(experts)}")
    if tables := report.get("tables"):
        lines.append(f"bits per weight of embedding and head: {tables_words(tables)}")
    if saved := report.get("checkpoint"):
        size, dense = size_words(saved["bytes"]), size_words(saved["dense_bytes"])
        lines.append(f"saved in {size}, against {dense} in 16 bits")
    if tuned := report.get("tuned"):
        lines.append(_tunings(tuned))
    if perplexity := report.get("perplexity"):
        measured = {name: windows_words(report, name) for name in perplexity}
        lines += ["", *_perplexities(perplexity, report.get("original_perplexity", {}), measured)]
    for name, moved in report.get("divergence", {}).items():
        error = moved["kl_std_error"]  # NaN of a single window
        spread = f" +- {error:.4f}" if math.isfinite(error) else ""
        lines.append(
            f"{name}: KL {moved['kl']:.4f}{spread} nats per token from the reference, 99% of them "
            f"at most {moved['kl_p99']:.4g}, same top token {moved['top1_agreement']:.1%}"
        )
    for name, same in report.get("agreement", {}).items():
        lines.append(
            f"{name}: greedy texts of {same['new_tokens']} tokens after {same['prompts']} prompts "
            f"agree in the first {same['prefix']:.1%}, {same['whole']:.1%} of them to the end"
        )
    lines += [""] if "tasks" in report else []
    for name, scores in report.get("tasks", {}).items():
        on = f"  ({scores['samples']} samples)" if "samples" in scores else ""
        lines.append(f"{name:<28}" + "  ".join(_score(scores)) + on)
    lines += _speeds(report.get("speed", {}))
    spent = ", ".join(f"{stage} {s:.1f} s" for stage, s in report.get("seconds", {}).items())
    peak = report.get("peak_memory", {})
    used = ", ".join(f"{key.removesuffix('_gb')} {peak[key]:.2f} GB" for key in peak)
    return "\n".join([*lines, "", f"time: {spent}", f"peak memory: {used}"])


def _score(scores: Mapping[str, float]) -> Iterator[str]:
    for key, value in scores.items():
        if key not in ("samples", "version") and not key.endswith("_stderr"):
            error = scores.get(f"{key}_stderr")
            yield f"{key} {value:.4g}" + (f" +- {error:.2g}" if error else "")


def _speeds(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    head = f"{'tokens per second':<20}{'prefill':>10}{'decode':>10}{'of copy':>9}"
    lines = ["", f"{head}{'model':>12}{'peak':>12}"]
    for name, one in found.items():
        lines.append(
            f"{name:<20}{one['prefill_tokens_per_second']:>10.4g}"
            f"{one['decode_tokens_per_second']:>10.4g}{one['bandwidth_share']:>9.0%}"
            f"{size_words(one['model_bytes']):>12}{size_words(one['peak_bytes']):>12}"
        )
        dense = found.get(name.replace("packed", "dense"), one)
        if dense is not one:
            ratio = one["decode_tokens_per_second"] / dense["decode_tokens_per_second"]
            lines[-1] += f"  decodes at {ratio:.2f} of dense"
    return lines


def windows_words(report: Mapping[str, Any], name: str) -> str:
    """On how much of a data set a perplexity was measured: 2 of 141 windows x 2048 tokens."""
    stamp = report.get("evaluation", {}).get(name)
    if stamp is None:
        return ""
    whole = report.get("windows", {}).get(name, {}).get("of")
    part = "" if whole in (None, stamp["windows"]) else f" of {whole}"
    return f"{stamp['windows']}{part} windows x {stamp['seqlen']} tokens"


def tables_words(found: Mapping[str, Any]) -> str:
    """The bits of embedding and head: 6.344, and 4.047 together with the matrices."""
    alone, both = (float(found[f"bits_per_weight{of}"]) for of in ("", "_with_matrices"))
    return f"{alone:.3f}, and {both:.3f} together with the matrices"


def experts_words(found: Mapping[str, Any]) -> str:
    """How many tokens experts saw: 3 to 410 tokens, and 12 of 64 matrices fewer than inputs."""
    least, usual, most = (found[f"{key}_tokens"] for key in ("fewest", "median", "most"))
    short, idle = found["short"], found["idle"]
    words = f"{least:,} to {most:,} tokens, in the median {usual:,.0f}"
    if short:
        words += f"; {short} of {found['matrices']} matrices fewer than they have inputs"
    return words + (f", {idle} of them none" if idle else "")


def _tunings(tuned: Sequence[Mapping[str, Any]]) -> str:
    noise = sum(one.get("within_noise", False) for one in tuned)
    return f"{len(tuned)} tunings of blocks, of which {noise} gained nothing beyond noise"


def _perplexities(
    found: Mapping[str, float], original: Mapping[str, float], measured: Mapping[str, str]
) -> list[str]:
    width = max(28, *(len(name) + 2 for name in found))
    if not original:
        rows = [f"{name:<{width}}{value:>12.4g}  {measured[name]}" for name, value in found.items()]
        return ["perplexity", *map(str.rstrip, rows)]
    lines = [f"{'perplexity':<{width}}{'original':>12}{'quantized':>12}{'change':>10}"]
    for name, value in found.items():
        before = original[name]
        finite = math.isfinite(before) and math.isfinite(value)
        change = _signed(value / before - 1) if finite else "-"
        line = f"{name:<{width}}{before:>12.4g}{value:>12.4g}{change:>10}  {measured[name]}"
        lines.append(line.rstrip())
    return lines


def _signed(share: float) -> str:
    """A change in percent, which has no sign where it rounds to nothing."""
    words = f"{share:+.1%}"
    return "0.0%" if words in ("-0.0%", "+0.0%") else words


def size_words(count: int) -> str:
    """A number of bytes for a person, in decimal units: 1.58 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"
