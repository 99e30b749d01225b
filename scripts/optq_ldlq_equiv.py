"""OPTQ and LDLQ give the same codes on 1000 x 1000 weights, uniform on [0, 1] (QuIP, Theorem 6).

    python scripts/optq_ldlq_equiv.py

`quip equivalence --wbits none` does the work, and takes all further flags.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["equivalence", "--wbits", "none", *sys.argv[1:]]))
