"""The finite grid on which OPTQ is worse than plain rounding, as published: 2 bits, n rows.

    python scripts/optq_counter.py

`quip counterexample --wbits 2 --rows n` does the work, and takes all further flags.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["counterexample", "--wbits", "2", "--rows", "n", *sys.argv[1:]]))
