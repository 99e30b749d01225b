"""Quantize and evaluate an OPT model (or any other): the command line of QuIP's opt.py.

    python scripts/opt.py facebook/opt-125m c4
    python scripts/opt.py facebook/opt-125m c4 --wbits 4 --quant ldlq --incoh_processing --save NAME
    python scripts/opt.py facebook/opt-125m c4 --wbits 4 --quant gptq --pre_gptqH --save NAME

`quip run` does the work, and takes the same flags and more.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
