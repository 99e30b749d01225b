"""Learned codebooks without error feedback: GPTVQ's script of this name.

    python scripts/gptvq/non_unif_no_opt.py demo pydoc --vq_dim 2 --wbits 2 --groupsize 2048

`quip run --quant nearest --codebook vq` does the work, and takes all further flags.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:], "--quant", "nearest", "--codebook", "vq"]))
