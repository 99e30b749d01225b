"""Flags of what computes, with how much memory, and where results go."""

import argparse
from pathlib import Path


def device_flags(group: argparse._ArgumentGroup) -> None:
    """What computes, and in what."""
    add = group.add_argument
    add("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="what the model computes in; auto, the default, is float32, and for a checkpoint of "
        "quip what the run computed in that saved it",
    )


def team_flags(group: argparse._ArgumentGroup) -> None:
    """How the processes of torchrun work together."""
    group.add_argument(
        "--fast_reduce",
        action="store_true",
        help="sum second moments as they come: a little faster, but codes then depend on the "
        "number of processes (torchrun)",
    )


def stream_flag(group: argparse._ArgumentGroup) -> None:
    """Whether a model is in memory as a whole."""
    group.add_argument(
        "--stream",
        default="auto",
        choices=["auto", "on", "off"],
        help="whether blocks of the model are read from its files when their turn comes; auto, the "
        "default, does so where the model takes more than a quarter of the free memory",
    )


def memory_flags(group: argparse._ArgumentGroup) -> None:
    """How much of a model, and of its hidden states, is in memory at once."""
    stream_flag(group)
    group.add_argument(
        "--activation_memory",
        type=float,
        metavar="GB",
        help="hidden states beyond so many GB live in a file, in the folder of finished blocks or, "
        "without one, that of temporary files (default: a quarter of the free memory)",
    )


def machine_flags(group: argparse._ArgumentGroup, *, out: str) -> None:
    """What computes, and where results go."""
    device_flags(group)
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help=out)
    add(
        "--overwrite",
        action="store_true",
        help="write where files are: --out loses those of the run before, a "
        "checkpoint is replaced whole",
    )
