"""Seeds of the codebooks, Mahalanobis against k-means++: GPTVQ's script of this name.

    python scripts/gptvq/kmeans_init.py --models meta-llama/Llama-2-7b-hf --dry_run

`quip table gptvq_seeds` does the work, for any models, and takes all further flags.
"""

import sys

from quip.cli import main

if __name__ == "__main__":
    sys.exit(main(["table", "gptvq_seeds", *sys.argv[1:]]))
