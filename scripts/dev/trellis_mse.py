"""The squared error of trellis codes on Gaussian weights, by code, bits and states.

Claim (QTIP, arXiv 2406.11235, tables 1 and 2): at 2 bits and 2^16 states 0.069, where 0.0625 is the
least that any code has, and E8P has 0.0913. Tables that are learned on the trellis need 2^12 states
for about as much. A row with a bound that it misses is printed as MISSED.

    python scripts/dev/trellis_mse.py --out results/trellis_mse.json

Weights are fresh, of variance 1, in circles of 256, at the scale that the codebook would take; the
same ones for all codes. Three minutes, with a compiler.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_rounding import commit, cpu_name
from torch import Tensor

from quip.codebooks.names import CODEBOOKS, LEARNED_STATES, MOST_STATES, TRELLIS_CODES, Bits
from quip.codebooks.trellis_codes import code, target_rms, weights_per_step
from quip.kernels import trellis
from quip.kernels.trellis import Tiling

WEIGHTS = 256  # of a circle
MOST = {  # squared error, of code, bits and states
    ("learned", 2, 12): 0.0715,
    ("learned", 2, 10): 0.0760,
    ("learned", 3, 12): 0.0187,
    ("learned", 4, 12): 0.0050,
    **{(name, 2, 16): 0.0690 for name in ("mcg", "mul1")},
    **{(name, 3, 16): 0.0177 for name in ("mcg", "mul1")},
    **{(name, 4, 16): 0.0046 for name in ("mcg", "mul1")},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The mean squared error beside the mean square of the weights, and its standard error."""

    code: str
    bits: Bits
    states: int  # 2^states of them
    mse: float
    error: float
    most: float | None  # what it may be

    @property
    def met(self) -> bool:
        return self.most is None or self.mse <= self.most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--circles", type=int, default=1024, help="of weights, up to 2^12 states")
    parser.add_argument("--large", type=int, default=256, help="circles with more states")
    parser.add_argument("--codes", nargs="+", default=TRELLIS_CODES, choices=TRELLIS_CODES)
    parser.add_argument("--bits", nargs="+", type=float, default=CODEBOOKS["trellis"].bits)
    parser.add_argument("--states", nargs="+", type=int, default=(*LEARNED_STATES, MOST_STATES))
    parser.add_argument("--seed", type=int, default=1, help="of the weights")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(args.seed)
    X = torch.randn(max(args.circles, args.large), WEIGHTS, generator=rng)
    rows = []
    for bits in args.bits:
        for name in args.codes:
            for states in args.states:
                if round(bits * weights_per_step(name, bits)) < states <= most_states(name):
                    circles = args.circles if states <= 12 else args.large
                    rows.append(measure(name, bits, states, X[:circles]))
                    print(line(rows[-1]), flush=True)
    if args.out:
        record = {
            "kind": "trellis_mse",
            "rows": [asdict(row) | {"met": row.met} for row in rows],
            "weights": WEIGHTS,
            "circles": args.circles,
            "large": args.large,
            "seed": args.seed,
            "cpu": cpu_name(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "commit": commit(),
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    return int(not all(row.met for row in rows))


def most_states(name: str) -> int:
    return max(LEARNED_STATES) if name == "learned" else MOST_STATES


def measure(name: str, bits: Bits, states: int, X: Tensor) -> Row:
    """Round each row of X, [circles, 256], as a tile of its own."""
    bits = int(bits) if bits == int(bits) else bits
    here, target = code(name, bits, states, X.device), target_rms(name, bits, states)
    x = (X * target).reshape(-1, here.V)
    walks = trellis.encode(x, here, tiles=len(X))
    x_hat = trellis.decode(walks[:, None], here, Tiling(len(X), here.V))
    squares = ((x_hat.double() - x) / target).square().view(len(X), -1).mean(1)
    sizes = X.double().square().mean(1)
    mse = squares.mean() / sizes.mean()  # large circles have large errors, whatever the code
    spread = (squares - mse * sizes).std() / sizes.mean()
    return Row(
        code=name,
        bits=bits,
        states=states,
        mse=float(mse),
        error=float(spread / len(X) ** 0.5),
        most=MOST.get((name, bits, states)),
    )


def line(row: Row) -> str:
    verdict = "" if row.met else f"  MISSED: at most {row.most}"
    return (
        f"{row.bits:>4} bits {row.code:>8} L = {row.states:2} {row.mse:.5f} +- "
        f"{row.error:.5f}{verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
