"""`python -m quip.run MODEL DATASET ...`: the door to quip/cli/run.py."""

import sys

from quip.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
