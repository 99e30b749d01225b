"""The flags of `quip run` that speak of QuIP#: lattices, the Hadamard transform, fine-tuning."""

import argparse

LATTICES = ("E8P12", "E8P12RVQ3B", "E8P12RVQ4B")


def codebook_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--codebook",
        default="int",
        choices=["int", *LATTICES],
        help="what weights are rounded to: int, the default, one of 2^wbits levels each; or eight "
        "together to a point of a lattice: E8P12 (2 bits), E8P12RVQ3B (3), E8P12RVQ4B (4)",
    )
    add(
        "--scale",
        choices=["auto"],
        help="auto: quantize each matrix with several scales of the lattice, and keep the one with "
        "the smallest proxy loss",
    )
    add(
        "--scale_override",
        type=float,
        metavar="X",
        help="the RMS that weights have when they meet the lattice (default: of six values around "
        "the Gaussian optimum, the one with the smallest squared error at each fit)",
    )
    add(
        "--resid_scale_override",
        type=float,
        metavar="X",
        help="by how much the second stage of a lattice magnifies what the first one left "
        "(default: 2.1 at 3 bits, 3.8 at 4)",
    )
    add(
        "--no_fuse",
        action="store_true",
        help="quantize q, k and v, and up and gate, one by one instead of stacked (lattices only)",
    )


def rotation_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--rotation",
        choices=["kronecker", "blocked", "hadamard"],
        help="the rotation by name: kronecker (QuIP), blocked (a factor for each block), hadamard "
        "(QuIP#: random signs and a Hadamard matrix; the default for lattices)",
    )
    add(
        "--hadamard_block",
        type=int,
        metavar="N",
        help="one Hadamard matrix for every N columns, where none fits them all",
    )


def tuning_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--ft_epochs",
        type=int,
        default=0,
        metavar="N",
        help="after each group of matrices tune what is left of the block, its norms and signs, "
        "to give the original outputs, for at most N passes (default 0: no tuning)",
    )
    add("--ft_lr", type=float, metavar="X", help="rate of weights and norms (default 5e-5)")
    add("--ft_signs_lr", type=float, metavar="X", help="rate of sign vectors (default 5e-4)")
    add("--ft_batch_size", type=int, metavar="N", help="windows in a step (default 8)")
    add(
        "--ft_patience",
        type=int,
        metavar="N",
        help="stop after N passes without a smaller held-out loss (default 3)",
    )
    add(
        "--ft_held_out",
        type=float,
        metavar="X",
        help="the share of calibration windows that tuning is judged on (default 0.25)",
    )
