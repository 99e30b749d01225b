"""The update of the codebooks, on and off: GPTVQ's script of this name.

    python scripts/gptvq/m_step.py --models meta-llama/Llama-2-7b-hf --dry_run

`quip table gptvq_update` does the work, for any models, and takes all further flags.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "gptvq_update", *sys.argv[1:]]))
