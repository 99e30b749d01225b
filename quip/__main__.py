"""`python -m quip COMMAND ...`."""

import sys

from quip.cli import main

sys.exit(main())
