"""The flags of `quip run`, in the groups of its help."""

import argparse
from pathlib import Path

from quip.cli.shared import machine_flags, number_or_auto, task_flags
from quip.cli.sharp import codebook_flags, rotation_flags, tuning_flags

NAMED = ("wikitext2", "ptb", "ptb-new", "c4", "c4-new", "pydoc")
NSAMPLES = 128  # as in the papers
PAPER_SETS = "wikitext2,ptb-new,c4-new"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """MODEL, DATASET and every flag."""
    # Without nargs="?", which would take nothing where a flag stands before DATASET.
    model_and_dataset(parser).required = False
    recipe_flags(parser)
    tuning_flags(parser.add_argument_group("fine-tuning"))
    _data_flags(parser.add_argument_group("data and evaluation"))
    task_flags(parser.add_argument_group("zero-shot tasks"))
    _machine_flags(parser.add_argument_group("machine and output"))


def model_and_dataset(parser: argparse.ArgumentParser) -> argparse.Action:
    """MODEL and DATASET, which is returned."""
    parser.add_argument(
        "model",
        help="a Hugging Face hub id, a local model folder, a .gguf file, or `demo`, the small "
        "OPT that comes with this package",
    )
    return parser.add_argument(
        "dataset",
        help=f"calibration text: {', '.join(NAMED)} (the documentation inside CPython, no "
        "download), or a .txt, .json, .jsonl or .parquet file or a folder of such files",
    )


def recipe_flags(parser: argparse.ArgumentParser) -> None:
    """All that says how weights are rounded."""
    parser.add_argument(
        "--config",
        action="append",
        type=Path,
        metavar="FILE",
        help="a YAML file of flag names and values; flags on the line win, wherever they stand",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="the flags of a named recipe (`quip recipes` lists them); flags on the line win",
    )
    _method_flags(parser.add_argument_group("method"))
    codebook_flags(parser.add_argument_group("codebook"))
    _incoherence_flags(parser.add_argument_group("incoherence processing"))


def _method_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--wbits",
        type=int,
        choices=[*range(2, 9), 16],
        help="bits per weight; 16, the default, evaluates the model as it is (a lattice has its "
        "own: leave it out)",
    )
    add(
        "--quant",
        default="ldlq",
        choices=["nearest", "gptq", "ldlq", "ldlqRG", "allbal", "ldlbal_admm"],
        help="how weights are rounded: nearest; gptq (OPTQ); ldlq (QuIP, the default); ldlqRG "
        "(LDLQ by diag(H), then greedy passes); allbal (greedy passes alone); ldlbal_admm "
        "(QuIP's Algorithm 5)",
    )
    add(
        "--npasses",
        type=int,
        metavar="N",
        help="greedy passes over the columns: by default 10 for ldlqRG and allbal, else 2 for "
        "lattices after feedback (10 with --faithful) and 0 for grids",
    )
    add("--unbiased", action="store_true", help="round at random, so that the mean is exact")
    add(
        "--groupsize",
        type=int,
        metavar="N",
        help="columns of a row that share one range in grid a (by default the whole row)",
    )
    _damping_flags(group)


def _damping_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--percdamp",
        type=float,
        default=0.01,
        metavar="X",
        help="what is added to the diagonal of H, as a share of its mean (default 0.01); ten "
        "times more after each failed factorisation, three times at most",
    )
    add(
        "--lazy_batch",
        action="store_true",
        help="accepted and ignored: updates are always blocked, with the same codes",
    )


def _incoherence_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--incoh_processing",
        action="store_true",
        help="QuIP's processing: short for --pre_gptqH --pre_rescale --pre_proj --qfn b",
    )
    add(
        "--pre_gptqH",
        action="store_true",
        help="accepted and ignored: H is always damped by --percdamp (0 turns it off)",
    )
    add("--pre_rescale", action="store_true", help="rescale the inputs, to balance W against H")
    add("--pre_proj", action="store_true", help="rotate W and H by random orthogonal matrices")
    add(
        "--pre_proj_extra",
        type=int,
        choices=[0, 1, 2],
        help="the rotation: 1, the default, a Kronecker product of two factors; 0 a factor for "
        "each block; 2 as 0, without permutations",
    )
    rotation_flags(group)
    _grid_flags(group)


def _grid_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--qfn",
        choices=["a", "b"],
        help="the grid: a, from the smallest to the largest weight of each row; b, symmetric "
        "about 0 with a range of rho RMS (for rotated weights)",
    )
    add(
        "--range",
        metavar="{tensor,column,N}",
        help="what the range of grid b or the scale of a lattice is fitted to: the whole matrix "
        "once, or the running weights of each column (the default; a lattice: of 8) or of every N "
        "columns as the rounding reaches them",
    )
    add(
        "--rho",
        type=number_or_auto,
        metavar="{X,auto}",
        help="grid b reaches X times the RMS of the weights (default: of ten values around the "
        "Gaussian optimum, the one with the smallest squared error at each fit; 2.4 for nearest); "
        "auto: quantize each matrix with the default and with each of seven fixed values, and keep "
        "the result with the smallest proxy loss",
    )
    add(
        "--faithful",
        action="store_true",
        help="the paper's algorithm as printed: weights clipped before feedback, and for grid b "
        "one range of 2.4 RMS for the matrix; for lattices one published scale for the matrix",
    )


def calibration_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--nsamples",
        type=int,
        default=NSAMPLES,
        metavar="N",
        help=f"calibration windows (default {NSAMPLES})",
    )
    add(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens in a window (default: what the model can take, at most 2048)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of sampling and rotations (default 0)")


def _data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--plan",
        type=Path,
        metavar="FILE",
        help='recipes by pattern of matrix names, as YAML: "*.v_proj": {wbits: 4} and so on; the '
        "first that matches counts, and the recipe of this line is for all other matrices",
    )
    add(
        "--hessians",
        type=Path,
        metavar="DIR",
        help="quantize from this store (`quip hessians`), without calibration: leave out DATASET",
    )
    calibration_flags(group)
    add(
        "--eval_datasets",
        metavar="A,B,...",
        help="where perplexity is measured: names as for DATASET, or `none`; by default pydoc "
        f"if that is DATASET, else {PAPER_SETS}",
    )
    add(
        "--eval_nsamples",
        type=int,
        metavar="N",
        help="evaluate on the first N windows of each data set (default: all)",
    )
    add(
        "--compare",
        action="store_true",
        help="evaluate the original model too, and show the difference",
    )
    add(
        "--proxy_only",
        action="store_true",
        help="quantize and report the proxy losses, without perplexities",
    )


def _machine_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--save",
        type=Path,
        metavar="DIR",
        help="a new or empty folder for the packed checkpoint, written before evaluation",
    )
    add(
        "--load",
        metavar="DIR",
        help="evaluate this checkpoint of MODEL, which is then only read for --compare",
    )
    add(
        "--resume",
        action="store_true",
        help="take up the run that --out holds, after its last finished block; without one, start",
    )
    machine_flags(
        group,
        out="a folder for run.json, layers.csv, layers.png and the finished blocks; it must be new "
        "or empty",
    )
