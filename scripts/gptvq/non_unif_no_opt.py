"""Learned codebooks without error feedback: GPTVQ's script of this name.

    python scripts/gptvq/non_unif_no_opt.py demo pydoc --vq_dim 2 --wbits 2 --groupsize 2048

`quip run --quant nearest --codebook vq --faithful --codebook_update none` does the work, and takes
all further flags.
"""

import sys

from quip.cli import main

WITHOUT = ["--quant=nearest", "--codebook=vq", "--faithful", "--codebook_update=none"]

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:], *WITHOUT]))
