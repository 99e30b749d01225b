"""Zero-shot tasks on a model or a checkpoint: the command line of QuIP's main.py.

    python scripts/main.py facebook/opt-125m c4 --wbits 16 --nsamples 0 --task arc_easy
    python scripts/main.py facebook/opt-125m c4 --load NAME --nsamples 0 --task lambada

`quip run` does the work. --task names one or several of its tasks; `lambada` is lambada_quip, as
prompted there. `--nsamples 0`, for there is nothing to calibrate, is the default.
"""

import argparse
import sys

from quip.cli import main


def arguments(argv: list[str]) -> list[str]:
    """The line as `quip run` takes it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--task", required=True, metavar="A,B,...")
    parser.add_argument("--nsamples", default="0", metavar="N")
    parser.add_argument("--wbits", default="16", metavar="B")
    args, others = parser.parse_known_args(argv)
    tasks = ["lambada_quip" if name == "lambada" else name for name in args.task.split(",")]
    windows = [] if args.wbits == "16" else ["--nsamples", args.nsamples]
    given = [*others, "--wbits", args.wbits, *windows]
    return ["run", *given, "--eval_datasets", "none", "--tasks", ",".join(tasks)]


if __name__ == "__main__":
    sys.exit(main(arguments(sys.argv[1:])))
