"""Quantize and evaluate a model by GPTVQ: the command line of its published llama.py.

    python scripts/gptvq/llama.py meta-llama/Llama-2-7b-hf wikitext2 --use-vq --vq-dim 2 --wbits 2 \
        --groupsize 2048 --columns-per-group 256 --kmeans-init-method mahalanobis \
        --kmeans-iters 100 --hessian-weighted-lookups --include-m-step --codebook-bitwidth 8 \
        --quantize-per-codebook

`quip run --faithful` does the work, for any model; `quip export --dense` writes --output-dir. The
published flags have their published defaults, and all other flags are those of `quip run`.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quip.cli import main
from quip.cli.parse import Parser
from quip.cli.run import PAPER_SETS
from quip.cli.streams import complain
from quip.errors import UsageError
from quip.files import check_new

DEFAULTS = {"wbits": 16.0, "groupsize": -1, "vq_dim": 2, "kmeans_iters": 10}
IGNORED = "accepted and ignored: "
# Of each flag what makes its value of a word (bool: a switch, without one), and its help.
FLAGS: dict[str, tuple[Any, str]] = {
    "seed": (str, "of sampling (default 0)"),
    "nsamples": (str, "calibration windows (default 128)"),
    "percdamp": (str, "damping, a share of the mean of diag(H) (default 0.01)"),
    "wbits": (float, "bits per weight; 16, the default, evaluates the model as it is"),
    "groupsize": (int, "weights that share a codebook, or of a row a grid (default -1: a row)"),
    "nearest": (bool, "round to nearest grids, without error feedback"),
    "no-quant": (bool, "evaluate the model as it is"),
    "new-eval": (bool, "evaluate PTB and C4 too"),
    "output-dir": (Path, "a new folder for dense Hugging Face weights; packed ones lie beside it"),
    "save": (Path, "a new folder for the packed checkpoint"),
    "true-sequential": (bool, f"{IGNORED}matrices always come in their true order"),
    "model-type": (str, f"{IGNORED}a model knows its type"),
    "assignment-chunk-size": (str, f"{IGNORED}memory is bounded"),
    "kpp-n-subsample": (str, f"{IGNORED}the published code never read it"),
    "use-vq": (bool, "learned codebooks instead of grids"),
}
VECTORS: dict[str, tuple[Any, str]] = {
    "vq-dim": (int, "neighbours that share a code: 1, 2 or 4 (default 2)"),
    "columns-per-group": (int, "columns of a group of weights (default 256)"),
    "kmeans-init-method": (str, "cdf, the default with --vq-dim 1; kpp; mahalanobis"),
    "kmeans-iters": (int, "iterations of EM (default 10)"),
    "hessian-weighted-lookups": (bool, "weigh errors by what they cost"),
    "include-m-step": (bool, "update codebooks after the sweep"),
    "only-init-kmeans": (bool, "no error feedback"),
    "codebook-bitwidth": (int, "bits of entries: 8 or 4 (default: 16)"),
    "quantize-per-codebook": (bool, "a scale for each codebook, instead of each block of columns"),
    "quantize-during-kmeans": (bool, f"{IGNORED}codebooks are rounded after the last iteration"),
    "svd-rank": (float, "share of the rank that codebooks keep"),
    "vq-scaling-blocksize": (int, "weights that share a scale (default -1: none)"),
    "vq-scaling-n-bits": (str, "4 and nothing else"),
    "vq-scaling-norm": (str, "max and nothing else"),
    "vq-scaling-domain": (str, "log and nothing else"),
}
SCALES = {"vq-scaling-n-bits": "4", "vq-scaling-norm": "max", "vq-scaling-domain": "log"}
STOPS = {
    "act-order": "the published code stops at it too",
    "static-groups": "the published code stops at it too",
    "sym": "grids reach from the smallest weight of a row to its largest",
}


def published() -> Parser:
    """The published flags; none is there that was not said."""
    assert __doc__
    parser = Parser(
        description=__doc__.splitlines()[0],
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name in ("model", "dataset"):
        parser.add_argument(name, help=f"as {name.upper()} of `quip run`")
    stops = {name: (bool, f"refused: {reason}") for name, reason in STOPS.items()}
    for name, (kind, words) in {**FLAGS, **VECTORS, **stops}.items():
        how = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": "X"}
        parser.add_argument(f"--{name}", help=words, **how)
    return parser


def run_line(said: Mapping[str, Any]) -> list[str]:
    """The words of `quip run` for what was said. Raises UsageError for what has no meaning."""
    args = {**DEFAULTS, **said}
    for name, reason in STOPS.items():
        if _dest(name) in said:
            raise UsageError(f"--{name}: {reason}; leave it out")
    for name, only in SCALES.items():
        if (value := args.get(_dest(name), only)) != only:
            raise UsageError(
                f"--{name} {value}: scales are logarithms of the largest weight, of 4 bits; leave "
                "it out"
            )
    for name in VECTORS:
        if _dest(name) in said and "use_vq" not in said:
            raise UsageError(f"--{name} speaks of codebooks: add --use-vq")
    line = [args["model"], args["dataset"], *_words(said, ("seed", "nsamples", "save"))]
    if "new_eval" in said:
        line.append(f"--eval_datasets={PAPER_SETS}")
    elif args["dataset"] in ("wikitext2", "ptb", "c4"):
        line.append("--eval_datasets=wikitext2")
    unquantized = "no_quant" in said or (args["wbits"] == 16 and "use_vq" not in said)
    if unquantized:
        return [*line, "--wbits=16"]
    if not args["wbits"].is_integer():
        raise UsageError(f"--wbits {args['wbits']:g}: a whole number of bits per weight is needed")
    line += [f"--wbits={args['wbits']:.0f}", *_words(said, ("percdamp",))]
    return line + (_of_vectors(args) if "use_vq" in said else _of_grids(args))


def _of_grids(args: Mapping[str, Any]) -> list[str]:
    group = [] if args["groupsize"] == -1 else [f"--groupsize={args['groupsize']}"]
    return [f"--quant={'nearest' if 'nearest' in args else 'gptq'}", "--qfn=a", *group]


def _of_vectors(args: Mapping[str, Any]) -> list[str]:
    dim, group, bits = args["vq_dim"], args["groupsize"], args.get("codebook_bitwidth")
    if args["wbits"] == 16:
        raise UsageError("--use-vq with --wbits 16, the default, quantizes nothing: say --wbits 2")
    if "nearest" in args:
        raise UsageError("--nearest rounds to grids: with --use-vq say --only-init-kmeans instead")
    if group == -1:
        raise UsageError(
            "--groupsize -1, the default, with --use-vq: say how many weights share a codebook, "
            "such as --groupsize 2048 for --vq-dim 2 --wbits 2"
        )
    for name in ("quantize-per-codebook", "quantize-during-kmeans"):
        if _dest(name) in args and bits is None:
            raise UsageError(f"--{name} speaks of rounded codebooks: add --codebook-bitwidth 8")
    seeds = args.get("kmeans_init_method", "cdf" if dim == 1 else "mahalanobis")
    if seeds == "cdf" and dim != 1:
        raise UsageError(
            f"--kmeans-init-method cdf with --vq-dim {dim}: quantiles are of single weights; say "
            "mahalanobis or kpp"
        )
    line = ["--codebook=vq", "--faithful", f"--vq_dim={dim}", f"--groupsize={group}"]
    line += [f"--quant={'nearest' if 'only_init_kmeans' in args else 'gptq'}"]
    line += [f"--vq_seed={seeds}", f"--em_iters={args['kmeans_iters']}"]
    line += [f"--vq_weights={'loss' if 'hessian_weighted_lookups' in args else 'none'}"]
    line += [f"--codebook_update={'cg' if 'include_m_step' in args else 'none'}"]
    line += [f"--codebook_bits={bits or 16}"]
    if bits == 8 and "quantize_per_codebook" not in args:  # others leave no choice
        line += ["--codebook_scale=columns"]
    if args.get("vq_scaling_blocksize", -1) != -1:
        line += [f"--vq_scaling={args['vq_scaling_blocksize']}"]
    return line + _words(args, ("columns_per_group", "svd_rank"))


def _notes(said: Mapping[str, Any]) -> list[str]:
    """What is done in another way than the published code's."""
    found = []
    if "use_vq" in said and said.get("vq_dim", 2) != 1 and "kmeans_init_method" not in said:
        found.append(
            "--kmeans-init-method cdf, the default, serves --vq-dim 1: mahalanobis is taken"
        )
    if "quantize_during_kmeans" in said:
        found.append("--quantize-during-kmeans: codebooks are rounded once, after the last step")
    return found


def _dest(name: str) -> str:
    return name.replace("-", "_")


def _words(given: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [f"--{name}={given[name]}" for name in names if name in given]


def door(argv: list[str]) -> int:
    """Run the line; then write the dense weights, if they are asked for."""
    args, further = published().parse_known_args(argv)
    said = vars(args)
    line, dense = run_line(said), said.get("output_dir")
    if dense is not None:
        if "--wbits=16" in line:
            raise UsageError(f"--output-dir {dense}: nothing is quantized; leave it out")
        over = [word for word in further if word == "--overwrite"]
        check_new(dense, "--output-dir", overwrite=bool(over))
        packed = said.get("save") or dense.with_name(f"{dense.name}-packed")
        line += [] if "save" in said else [f"--save={packed}"]
    for note in _notes(said):
        complain(f"quip: {note}")
    status = main(["run", *line, *further])
    if status or dense is None:
        return status
    return main(["export", str(packed), str(dense), "--dense", *over])


if __name__ == "__main__":
    try:
        sys.exit(door(sys.argv[1:]))
    except UsageError as error:
        complain(f"quip: {error}")
        sys.exit(2)
