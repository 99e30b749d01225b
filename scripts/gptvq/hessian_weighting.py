"""Codebooks fitted with and without the weights of H: GPTVQ's script of this name.

    python scripts/gptvq/hessian_weighting.py --models meta-llama/Llama-2-7b-hf --dry_run

`quip table gptvq_weighting` does the work, for any models, and takes all further flags. The paper
prints no such table.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "gptvq_weighting", *sys.argv[1:]]))
