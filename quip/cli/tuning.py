"""The flags of fine-tuning by block, and what they say."""

import argparse
from typing import TYPE_CHECKING

from quip.cli.parse import Arguments
from quip.cli.values import share_or_auto
from quip.errors import UsageError
from quip.jobs.requests import NO_SIDES_OF_A_STORE, NO_TARGET_OF_A_STORE

if TYPE_CHECKING:
    from quip.model.tune import BlockTuning

# What tuning takes.
TUNING = (
    *("epochs", "lr", "signs_lr", "centroids_lr", "schedule"),
    *("batch_size", "every", "patience", "held_out"),
)


def tuning_flags(group: argparse._ArgumentGroup) -> None:
    """Fine-tuning of blocks: TUNING, each behind --ft_."""
    add = group.add_argument
    add(
        "--ft_epochs",
        type=int,
        default=0,
        metavar="N",
        help="after each group of matrices tune what is left of the block, its norms, signs "
        "and what codebooks learn, to give the original outputs, for at most N passes (default 0: "
        "no tuning)",
    )
    add("--ft_lr", type=float, metavar="X", help="rate of weights and norms (default 5e-5)")
    add("--ft_signs_lr", type=float, metavar="X", help="rate of sign vectors (default 5e-4)")
    add(
        "--ft_centroids_lr",
        type=float,
        metavar="X",
        help="rate of learned centroids, and of scales and tables of trellis codes, as a share of "
        "their RMS (default 5e-3)",
    )
    add("--ft_batch_size", type=int, metavar="N", help="windows in a step (default 8)")
    add(
        "--ft_schedule",
        choices=["constant", "cosine"],
        help="of all rates; cosine: they fall to 0 over all passes (default constant)",
    )
    add(
        "--ft_every",
        type=int,
        metavar="N",
        help="compare losses at the first step after N windows (default: after a pass)",
    )
    add(
        "--ft_patience",
        type=int,
        metavar="N",
        help="stop after N comparisons in which the held-out loss fell by no more than the "
        "standard error of its fall (default 3)",
    )
    add(
        "--ft_held_out",
        type=float,
        metavar="X",
        help="the share of calibration windows that tuning is judged on (default 0.25)",
    )


def beside_flags(group: argparse._ArgumentGroup) -> None:
    """What rounding looks at beside the inputs of a matrix: --target_shrink and --two_sided."""
    group.add_argument(
        "--target_shrink",
        type=share_or_auto,
        metavar="A",
        help="round each matrix towards W + A (W* - W), where W* makes up for what the matrices "
        "before it have lost: A from 0 to 1, or `auto`, by a tenth of the windows, which are held "
        "out (default 0: towards W)",
    )
    group.add_argument(
        "--two_sided",
        action="store_true",
        help="round each matrix by the gradients at its outputs too (YAQA's sketch B), rows after "
        "rows, from one pass forward and back before the walk; kept where a quarter of the "
        "windows, which is held out, loses less by it",
    )


def refuse_beside(args: Arguments, *, quantizes: bool) -> None:
    """Raise UsageError for such flags where there is nothing for them to work with."""
    shrink = args.target_shrink
    weights = f"--token_weights {args.token_weights}"
    asked = {
        f"--target_shrink {shrink}": shrink,
        "--two_sided": args.two_sided,
        weights: args.token_weights != "none",
    }
    for flag in (flag for flag, given in asked.items() if given and not quantizes):
        raise UsageError(f"{flag} needs weights to quantize: give --wbits or --codebook")
    if shrink and args.hessians is not None:
        raise UsageError(NO_TARGET_OF_A_STORE.format(shrink=shrink))
    if args.two_sided and args.hessians is not None:
        raise UsageError(NO_SIDES_OF_A_STORE)
    if args.two_sided and args.codebook == "vq":
        raise UsageError(
            "--two_sided with --codebook vq, which rounds all rows of a matrix together: leave out "
            "one"
        )


def tuning_of(args: Arguments) -> "BlockTuning | None":
    """What the flags of `tuning_flags` say; None: no tuning."""
    if not args.ft_epochs:
        return None

    from quip.model.tune import BlockTuning

    given = {name: getattr(args, f"ft_{name}") for name in TUNING if f"ft_{name}" in args.given}
    return BlockTuning(**given)


def refuse_tuning(args: Arguments, *, quantizes: bool) -> None:
    """Raise UsageError for flags that speak of tuning where nothing is tuned."""
    if not args.ft_epochs:
        for name in TUNING:
            if name != "epochs" and f"ft_{name}" in args.given:
                raise UsageError(f"--ft_{name} speaks of fine-tuning: add --ft_epochs N")
    elif not quantizes:
        raise UsageError("--ft_epochs needs weights to quantize: give --wbits or --codebook")
