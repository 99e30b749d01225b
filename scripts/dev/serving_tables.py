"""Tables of what was measured of `quip serve`."""

from collections.abc import Mapping
from typing import Any


def of_serving(record: Mapping[str, Any]) -> str:
    """New tokens a second at so many clients, and the most memory, of each model in each mode."""
    counts = list(record["rows"][0]["tokens_per_second"])
    plural = ["client" if count == "1" else "clients" for count in counts]
    heads = [f"{count} {word}" for count, word in zip(counts, plural, strict=True)]
    lines = [
        f"| {record['model']} | requests | {' | '.join(heads)} | memory |",
        "|---|---|" + "---:|" * (len(counts) + 1),
    ]
    for row in record["rows"]:
        rates = " | ".join(f"{row['tokens_per_second'][count]:.0f}" for count in counts)
        lines.append(
            f"| {row['model']} | {row['mode']} | {rates} | {row['peak_bytes'] / 1e6:.0f} MB |"
        )
    rounds = f"the best of {record['rounds']} rounds" if record["rounds"] > 1 else "one round"
    threads = f"{record['threads']} thread" + "s" * (record["threads"] != 1)
    return "\n".join(lines) + (
        f"\n\nNew tokens a second of all clients, {record['new_tokens']} of each; {rounds}, "
        f"in turns ({record['dtype']}, {record['cpu']}, {threads}, "
        f"beside other work: a load of {record['load']:.0f}; commit {record['commit']}).\n"
    )


def of_soak_server(record: Mapping[str, Any]) -> str:
    """What a server held after its first requests and after its last."""
    lines = [
        "| | after | memory | descriptors | threads |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, part in record["parts"].items():
        rounds = part["rounds"]
        for number in (record["warm"], len(rounds) - 1):
            row = rounds[number]
            lines.append(
                f"| {name} | {record['round'] * (number + 1):,} requests | "
                f"{row['bytes'] / 1e6:.0f} MB | {row['descriptors']} | {row['threads']} |"
            )
    told = " and ".join(
        f"{_left(part['ended']):,} ({name})" for name, part in record["parts"].items()
    )
    return "\n".join(lines) + (
        f"\n\n{record['clients']} clients, who left {told} requests ({record['cpu']}, commit "
        f"{record['commit']}).\n"
    )


def _left(ended: Mapping[str, int]) -> int:
    """How many requests were left by their client."""
    return sum(count for kind, count in ended.items() if kind.endswith(" left"))
