"""Codebooks of 16 and 8 bits and of half the rank at equal bits: GPTVQ's script of this name.

    python scripts/gptvq/target_bitwidth.py --models meta-llama/Llama-2-7b-hf --dry_run

`quip table gptvq_precision` does the work, for any models, and takes all further flags.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "gptvq_precision", *sys.argv[1:]]))
