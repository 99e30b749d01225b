"""Proxy losses of an OPT model (or any other): the command line of QuIP's opt_proxy.py.

    python scripts/opt_proxy.py c4 --wbits 4 --quant ldlq
    python scripts/opt_proxy.py pydoc --model demo --wbits 4 --quant ldlq

`quip proxy` does the work, and takes the same flags. Where no --hessians are named, `quip hessians`
collects them in runs/, in a folder for each model, text, --nsamples ..., or finds them there.
"""

import sys
import zlib
from pathlib import Path

from quip.cli import main, proxy
from quip.cli.parse import Parser, guarded


def call(args) -> None:
    flags = "nsamples", "seqlen", "seed", "dtype", "device"  # that the store depends on
    given = [(name, getattr(args, name)) for name in flags]
    words = [args.model, args.dataset, *(f"--{k}={v}" for k, v in given if v is not None)]
    names = [*(Path(name).name for name in words[:2]), f"{zlib.crc32(repr(words).encode()):08x}"]
    args.store = args.hessians or Path("runs", "-".join(["hessians", *names]))
    proxy.asked(args).recipes()  # what means nothing is refused before hours of collecting
    collect = ["hessians", *words, f"--save={args.store}", "--resume"]
    status = 0 if args.hessians else main(collect)
    sys.exit(status) if status else proxy.call(args)


if __name__ == "__main__":
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="calibration text, as for `quip hessians`")
    parser.add_argument("--model", default="facebook/opt-125m", help="(default: %(default)s)")
    parser.add_argument("--hessians", type=Path, metavar="DIR", help="its store, if there is one")
    parser.add_argument("--nsamples", type=int, default=128, help="windows (default %(default)s)")
    parser.add_argument("--seqlen", type=int, help="tokens of each (default: as `quip hessians`)")
    proxy.add_flags(parser)
    parser.set_defaults(call=call)
    sys.exit(guarded(parser, None))
