"""`python -m quip.lm_eval --model hf --model_args pretrained=DIR --tasks ...`: lm-eval itself.

The command `lm-eval` does not import quip, and so cannot read packed checkpoints. This door does,
and hands all arguments on.
"""

import sys
from importlib.util import find_spec

from quip.cli.streams import complain
from quip.errors import how_to_install


def main() -> int:
    """`python -m quip.lm_eval`. Returns the exit status."""
    if find_spec("lm_eval") is None:
        complain(
            "quip: quip.lm_eval needs the package lm-eval; "
            f"install it with: {how_to_install('eval')}"
        )
        return 1
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
