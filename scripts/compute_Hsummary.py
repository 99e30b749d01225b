"""Statistics of the Hessians in a store: the command line of QuIP's compute_Hsummary.py.

    python scripts/compute_Hsummary.py --dirname DIR --savename FILE

`quip summary DIR --out FILE` does the work, and takes all further flags. FILE becomes a folder:
summary.json, hessians.csv, spectra and plots.
"""

import sys

from quip.cli import main
from quip.cli.parse import Parser
from quip.cli.streams import complain
from quip.errors import UsageError

if __name__ == "__main__":
    parser = Parser(description="Statistics of stored Hessians; further flags as `quip summary`.")
    parser.add_argument("--dirname", required=True, metavar="DIR", help="the store")
    parser.add_argument("--savename", required=True, metavar="FILE", help="a folder for the result")
    try:
        args, further = parser.parse_known_args()
    except UsageError as error:
        complain(f"quip: {error}")
        sys.exit(2)
    sys.exit(main(["summary", args.dirname, "--out", args.savename, *further]))
