"""Quantize a model and keep the Hessians that it was done with: the line of QuIP's opt_saveH.py.

    python scripts/opt_saveH.py facebook/opt-125m c4 --wbits 4 --quant ldlq --save DIR

`quip hessians --from quantized` does the work, and takes the same flags and more.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["hessians", *sys.argv[1:], "--from", "quantized"]))
