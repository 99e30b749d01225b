"""`quip finetune CHECKPOINT DATASET --save OUT`: a checkpoint tuned against its original."""

import argparse
from pathlib import Path

from quip.cli.machine import stream_flag
from quip.cli.parse import as_given, refuse_small
from quip.cli.streams import say
from quip.cli.tuning import TUNING
from quip.cli.values import place, seed
from quip.jobs.requests import request

HELP = "tune a checkpoint against the model it was quantized from"
EXAMPLES = """
quip finetune runs/demo-2bit pydoc --teacher demo --epochs 1 --save runs/demo-tuned
"""


def build(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, and what to call with them."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="a folder written by `quip run ... --save DIR`")
    add("dataset", type=place, help="text to tune on: names as for `quip run`, or files")
    add(
        "--teacher",
        type=place,
        metavar="MODEL",
        help="the original, whose predictions are learnt (default: the model that the "
        "checkpoint's run.json names)",
    )
    add("--save", type=Path, required=True, metavar="OUT", help="the folder of the new checkpoint")
    add("--overwrite", action="store_true", help="let OUT be a checkpoint, which is replaced whole")
    _tuning_flags(parser.add_argument_group("tuning"))
    _data_flags(parser.add_argument_group("data and machine"))
    parser.set_defaults(call=call)


def _tuning_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=int, metavar="N", help="at most (default 8)")
    add(
        "--lr",
        type=float,
        metavar="X",
        help="Adam's rate for norms, biases and lm_head, unless that is tied (default 5e-5)",
    )
    add("--signs_lr", type=float, metavar="X", help="the same for sign vectors (default 5e-4)")
    add(
        "--centroids_lr",
        type=float,
        metavar="X",
        help="the same for learned centroids, scales and tables of trellis codes, as a share of "
        "their RMS (default 5e-3)",
    )
    add(
        "--schedule",
        choices=["constant", "cosine"],
        help="of all rates; cosine: they fall to 0 over all epochs (default constant)",
    )
    add("--batch_size", type=int, metavar="N", help="windows a step (default 2)")
    add(
        "--every",
        type=int,
        metavar="N",
        help="compare KL divergences at the first step after N windows, as where one epoch of many "
        "is all there is (default: after an epoch)",
    )
    add(
        "--patience",
        type=int,
        metavar="N",
        help="end after N comparisons in which the held-out KL divergence fell by no more than the "
        "standard error of its fall (default 3)",
    )
    add(
        "--held_out",
        type=float,
        metavar="X",
        help="the share of the windows on which states are compared (default 0.25)",
    )


def _data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--nsamples",
        type=int,
        default=128,
        metavar="N",
        help="windows, those held out among them (default 128)",
    )
    add(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens in a window (default: what the model can take, at most 2048)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of sampling and order (default 0)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="what the new checkpoint computes in; auto, the default, is as before",
    )
    stream_flag(group)


def call(args: argparse.Namespace) -> None:
    """Tune, and say what came of it."""
    refuse_small(args, nsamples=2, seqlen=2)

    from quip.jobs.finetune import FineTuning, finetune_checkpoint
    from quip.model.tune import ModelTuning

    given = {name: getattr(args, name) for name in TUNING}
    tuning = ModelTuning(**{name: x for name, x in given.items() if x is not None})
    record = finetune_checkpoint(request(FineTuning, args, tuning=tuning, flags=as_given(args)))
    found = (
        f"KL divergence on {record.windows_held_out} windows held out: {record.kl_before:.4g} -> "
        f"{record.kl_after:.4g} after {record.epochs} epochs"
    )
    if record.kl_std_error is not None:
        found += (
            f", a gain of {record.kl_before - record.kl_after:.2g} +- {record.kl_std_error:.2g}"
        )
    if not record.improved:
        found += "; nothing improved, so nothing is written"
    elif record.within_noise:
        found += "; that is within noise: hold out more windows (--nsamples, --held_out)"
    say(found)
    if record.improved:
        say(f"{args.save}: the tuned checkpoint; measure it with: quip evaluate {args.save}")
