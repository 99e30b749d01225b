"""Proxy losses of an OPT model (or any other): the command line of QuIP's opt_proxy.py.

    python scripts/opt_proxy.py c4 --wbits 4 --quant ldlq
    python scripts/opt_proxy.py pydoc --model demo --wbits 4 --quant ldlq

`quip proxy` does the work, and takes the same flags. Where no --hessians are named, `quip hessians`
collects those of the data set in runs/, or completes and finds them there.
"""

import sys
from pathlib import Path

from quip.cli import main, proxy
from quip.cli.door import Parser, guarded


def call(args) -> None:
    names = (Path(name).name for name in (args.model, args.dataset))
    args.store = args.hessians or Path("runs", "-".join(["hessians", *names]))
    proxy.asked(args).recipes()  # what means nothing is refused before hours of collecting
    if args.hessians is None:
        collect = ["hessians", args.model, args.dataset, "--nsamples", args.nsamples]
        collect += ["--save", args.store, "--resume", "--seed", args.seed, "--dtype", args.dtype]
        collect += ["--device", args.device] if args.device else []
        if status := main([str(word) for word in collect]):
            sys.exit(status)
    proxy.call(args)


if __name__ == "__main__":
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="calibration text, as for `quip hessians`")
    parser.add_argument("--model", default="facebook/opt-125m", help="(default: %(default)s)")
    parser.add_argument("--hessians", type=Path, metavar="DIR", help="its store, if there is one")
    parser.add_argument("--nsamples", default=128, help="calibration windows (default 128)")
    proxy.add_flags(parser)
    parser.set_defaults(call=call)
    sys.exit(guarded(parser, None))
