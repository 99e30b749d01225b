"""Processes of a team compute the same only if they are alike: what differs is said in one line."""

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import xxhash

import quip
from quip.errors import UsageError, short
from quip.jobs.fingerprint import identity_of
from quip.model.load import LoadedModel
from quip.model.records import versions
from quip.model.team import Team

NAMED = 5  # differences in a message


def check_request(team: Team, asked: object, device: str) -> None:
    """Raise UsageError unless all processes run the same program, asked for the same.

    `asked` is a request, a dataclass. What it asks for is compared flag by flag where it has its
    flags, otherwise field by field.
    """
    if team.size == 1:
        return
    known = {field.name: getattr(asked, field.name) for field in fields(cast(Any, asked))}
    check_alike(
        team,
        {
            "versions": versions(),
            "code of quip": _digest_of_code(),
            "asked for": known.get("flags") or known,
            "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
            "instructions of the processor": torch.backends.cpu.get_cpu_capability(),
            "device": _kind(torch.device(device)),
        },
    )


def check_inputs(team: Team, models: Mapping[str, LoadedModel], **data: Any) -> None:
    """Raise UsageError unless all processes have read the same models, and the same data.

    A process that lacks a file has failed by then, which its own error says.
    """
    if team.size > 1:
        check_alike(team, {name: identity_of(model) for name, model in models.items()} | data)


def check_alike(team: Team, found: Mapping[str, Any]) -> None:
    """Raise UsageError, with what differs and where, unless all processes found the same."""
    if team.size == 1:
        return
    heard = team.hear([socket.gethostname(), dict(_flat(found))])
    names = [f"process {rank} ({host})" for rank, (host, _) in enumerate(heard)]
    keys = dict.fromkeys(key for _, each in heard for key in each)
    differences = []
    for key in keys:
        who: dict[str, list[str]] = {}
        for name, (_, each) in zip(names, heard, strict=True):
            who.setdefault(short(each.get(key, "missing")), []).append(name)
        if len(who) > 1:
            said = "; ".join(f"{value} in {_listed(them)}" for value, them in who.items())
            differences.append(f"{key}: {said}")
    if differences:
        more = len(differences) - NAMED
        rest = [f"{more} more"] if more > 0 else []
        raise UsageError(
            f"the processes are not alike: {' | '.join(differences[:NAMED] + rest)}; start all of "
            "them with the same program, flags and files"
        )


def _flat(words: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names, and values as text."""
    for key, value in words.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _digest_of_code() -> str:
    """A hash of all files of this package, which a checkout may have changed without a version."""
    digest, home = xxhash.xxh3_128(), Path(quip.__file__).parent
    for folder, below, names in os.walk(home):
        below[:] = sorted(name for name in below if name != "__pycache__")
        for path in (Path(folder, name) for name in sorted(names)):
            digest.update(str(path.relative_to(home)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
