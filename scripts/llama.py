"""Quantize and evaluate a Llama model: the command line of QuIP's llama.py.

    python scripts/llama.py MODEL c4 --wbits 2 --quant ldlq --incoh_processing

`quip run` does the work, for any decoder, and takes the same flags and more.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
