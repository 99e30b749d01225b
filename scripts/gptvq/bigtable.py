"""The main table of GPTVQ: its published script of this name.

    python scripts/gptvq/bigtable.py --models meta-llama/Llama-2-7b-hf --dry_run

`quip table gptvq` does the work, for any models, and takes all further flags. The published script
runs 19 configurations of nine models.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "gptvq", *sys.argv[1:]]))
