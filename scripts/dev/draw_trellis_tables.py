"""Draw the tables of trellis codes that lie in the package: Lloyd's algorithm on the trellis.

    python scripts/dev/draw_trellis_tables.py               (all of them: six minutes)
    python scripts/dev/draw_trellis_tables.py learned-2-10  (this one; the others stay as they are)
    python scripts/dev/draw_trellis_tables.py --check       (write nothing, exit 1 if one differs)

A round finds the nearest walks to fresh Gaussian weights of variance 1, in circles of 256, and
moves each value C towards the mean of the weights that met it, and beyond:

    C += step (sum - count C) / (count + 4),   step falling from 3 to 0

Tables begin with random values, and end in float16. They come out bit for bit on any machine:
weights are multiples of 2^-12 from a generator whose streams are frozen, sums of them are exact,
all else is rounded by each operation alone, and all forms of the search take the same walks.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from quip.codebooks.names import CODEBOOKS, LEARNED_STATES
from quip.codebooks.trellis_codes import (
    TABLES,
    hybrid_name,
    hybrid_places,
    learned_name,
    weights_per_step,
)
from quip.files import replacing
from quip.kernels import trellis
from quip.kernels.trellis import Code
from quip.kernels.trellis.reference import states_of

WEIGHTS = 256  # of a circle
UNIT = 2**-12
BITS = CODEBOOKS["trellis"].bits
FARTHEST, REST = 3.0, 4  # the first step, and what is added to counts


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a table is for, and how long it is made better."""

    seed: tuple[int, ...]
    step_bits: int
    rows: Tensor  # of each state [states]: the row of the table that it reads
    signs: Tensor  # [states, V], and what it makes of it
    circles: int  # of weights in a round
    rounds: int

    @property
    def V(self) -> int:
        return self.signs.shape[1]


def learned(bits: float, L: int) -> Plan:
    """A row for each state, and on average 32 weights of a round for each row."""
    V = weights_per_step("learned", bits)
    return Plan(
        seed=(L, round(2 * bits)),
        step_bits=round(bits * V),
        rows=torch.arange(2**L),
        signs=torch.ones(2**L, V),
        circles=2**L // 8,
        rounds=500 if L == 12 else 1000,
    )


def hybrid(bits: float) -> Plan:
    """The 512 rows that 2^16 states share."""
    rows, signs = hybrid_places(16)
    seed = (16, round(2 * bits))
    return Plan(seed=seed, step_bits=round(2 * bits), rows=rows, signs=signs, circles=64, rounds=24)


PLANS = {
    **{learned_name(k, L): (learned, (k, L)) for L in LEARNED_STATES for k in BITS},
    **{hybrid_name(k): (hybrid, (k,)) for k in BITS},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PLANS)}")
    parser.add_argument("--check", action="store_true", help="compare; exit 1 if one differs")
    args = parser.parse_args()
    if unknown := set(args.names) - set(PLANS):
        parser.error(f"no table is called {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # a round is too short to share
    tables = load_file(TABLES) if TABLES.exists() else {}
    differ = []
    for name in args.names or PLANS:
        table = draw(name)
        same = name in tables and np.array_equal(table, tables[name])
        print(f"{name}: {'the same' if same else 'another one'}", flush=True)
        if not same:
            differ.append(name)
            tables[name] = table
            if not args.check:
                keep(tables)
    return int(args.check and bool(differ))


def draw(name: str) -> NDArray[np.float16]:
    """The table of this name, [rows, V]."""
    make, of = PLANS[name]
    plan = make(*of)
    rng = np.random.RandomState(plan.seed)
    C = units(rng, int(plan.rows.max()) + 1, plan.V) * UNIT
    if plan.rows.numel() > len(C):
        C[:, 0] = abs(C[:, 0])  # half of the states negate it
    for r in range(plan.rounds):
        step = FARTHEST * (1 - r / plan.rounds)
        count, total = meet(C, plan, rng)
        C = C + step * ((total - count * C) / (count + REST))
    return C.astype(np.float16)


def meet(
    C: NDArray[np.float64], plan: Plan, rng: np.random.RandomState
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many steps met each row, [rows, 1], and the sums of their weights, [rows, V]."""
    whole = units(rng, plan.circles * WEIGHTS // plan.V, plan.V)
    x = torch.from_numpy((whole * UNIT).astype(np.float32))  # exact: less than 2^24 units
    table = torch.from_numpy(C).float()[plan.rows] * plan.signs
    code = Code("table", plan.step_bits, table.contiguous())
    walks = trellis.encode(x, code, tiles=plan.circles).view(plan.circles, -1)
    states = states_of(walks, code).flatten().long()
    rows = plan.rows[states].numpy()
    whole *= plan.signs[states].numpy()
    count = np.bincount(rows, minlength=len(C))[:, None].astype(np.float64)
    sums = [np.bincount(rows, weights=w, minlength=len(C)) for w in whole.T]
    return count, np.stack(sums, 1) * UNIT


def units(rng: np.random.RandomState, *shape: int) -> NDArray[np.float64]:
    """Gaussian numbers of variance 1, rounded to multiples of UNIT and divided by it.

    Rounded, since their logarithms may differ in the last bit from one machine to another.
    """
    return np.rint(rng.standard_normal(shape) / UNIT)


def keep(tables: Mapping[str, NDArray[np.float16]]) -> None:
    with replacing(TABLES) as partial:
        save_file({name: tables[name] for name in PLANS if name in tables}, partial)


if __name__ == "__main__":
    sys.exit(main())
