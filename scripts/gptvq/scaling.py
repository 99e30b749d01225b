"""Block scaling on and off at equal bits: GPTVQ's script of this name.

    python scripts/gptvq/scaling.py --models meta-llama/Llama-2-7b-hf --dry_run

`quip table gptvq_scaling_equal` does the work, for any models, and takes all further flags. Scales
serve 64 weights, as in the paper's Table 17; the published script says 32. At equal groups, with
all sizes of blocks: `quip table gptvq_scaling`.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "gptvq_scaling_equal", *sys.argv[1:]]))
