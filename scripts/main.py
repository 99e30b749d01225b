"""Zero-shot tasks on a model or a checkpoint: the command line of QuIP's main.py.

    python scripts/main.py facebook/opt-125m c4 --wbits 16 --nsamples 0 --task arc_easy
    python scripts/main.py facebook/opt-125m c4 --load NAME --nsamples 0 --task lambada

`quip run` does the work, and takes the same flags. Perplexity is measured only if --eval_datasets
are named.
"""

import sys

from quip.cli import run
from quip.cli.flags import NSAMPLES
from quip.cli.parse import Parser, guarded
from quip.errors import UsageError


def call(args) -> None:
    if args.nsamples == 0:
        named = f"--wbits {args.wbits}" if args.wbits else f"--codebook {args.codebook}"
        if named not in ("--wbits 16", "--codebook int") and not (args.load or args.hessians):
            raise UsageError(f"--nsamples 0 with {named}: calibration needs windows; leave it out")
        args.nsamples = NSAMPLES  # as if it were not given: nothing is calibrated
        args.given.discard("nsamples")
    args.eval_datasets = args.eval_datasets or "none"
    tasks = vars(args).pop("task").split(",")
    args.tasks = ",".join("lambada_quip" if name == "lambada" else name for name in tasks)
    run.call(args)


if __name__ == "__main__":
    parser = Parser(description=__doc__.splitlines()[0])
    run.build(parser)
    words = "zero-shot tasks, as --tasks of `quip run`; lambada is lambada_quip, as prompted there"
    parser.add_argument("--task", required=True, metavar="A,B,...", help=words)
    parser.set_defaults(call=call)
    sys.exit(guarded(parser, None))
