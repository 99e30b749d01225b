"""What trellis codes read of the flags. No torch: refusals come at once."""

from functools import partial
from typing import TYPE_CHECKING, Any

from quip.codebooks.names import LEARNED_STATES, MOST_STATES, Bits, Choice
from quip.errors import UsageError
from quip.matrix.said import tile_of
from quip.matrix.takes import Take, columns_of

if TYPE_CHECKING:
    from quip.codebooks import Trellis

WIDEST = 64  # bits of a row of a tile
MOST_OWN = 12  # bits of a state, for a table in each matrix
RANGE = 8  # columns that share a scale
PASSES = 1  # a second one gains a third as much
SIZES = (0.93, 1.0, 1.07)  # of weights that meet the code, to try


def trellis(take: Take) -> Choice:
    """A trellis code, with one scale for the columns that --range says."""
    bits, code = take("wbits"), take("trellis_code") or "learned"
    weights = 2 if code == "hyb" or bits % 1 else 1  # of a step
    states = _states(take, code, round(bits * weights))
    rows, columns = _tile(take, bits, weights, states)
    scale, override = take("scale"), take("scale_override")
    if scale and override:
        raise UsageError("--scale auto tries several scales: leave out what fixes one")
    made = {"code": code, "bits": bits, "states": states, "rows": rows, "columns": columns}
    return Choice(
        codebook=partial(_trellis, **made, size=override or 1.0, own=_own(take, code, states)),
        trials=tuple({"size": size} for size in SIZES) if scale else (),
        group=columns_of(take("range_") or str(columns * -(-RANGE // columns)), least=columns),
        stack=not take("no_fuse"),
        rotation="hadamard",
        passes=PASSES,
    )


def _states(take: Take, code: str, step: int) -> int:
    """The bits of a state, of a code whose steps bring so many."""
    said = take("trellis_states")
    states: int = said or (max(LEARNED_STATES) if code == "learned" else MOST_STATES)
    if code == "learned" and states not in LEARNED_STATES:
        there = ", ".join(map(str, LEARNED_STATES))
        raise UsageError(
            f"--trellis_states {states}: learned codes have {there}; say one of them, or another "
            "--trellis_code"
        )
    if step >= states:
        raise UsageError(
            f"--trellis_states {states} --wbits {take('wbits')}: a step brings {step} bits, and a "
            f"state has more than that; say {step + 1} or more"
        )
    return states


def _own(take: Take, code: str, states: int) -> bool:
    """Whether each matrix has a table of its own."""
    own: bool = take("own_table")
    if own and (code == "hyb" or states > MOST_OWN):
        raise UsageError(
            f"--own_table with --trellis_code {code} of 2^{states} states: a table of so many "
            f"numbers is larger than most matrices; say learned, or --trellis_states {MOST_OWN}"
        )
    return own


def _tile(take: Take, bits: Bits, weights: int, states: int) -> tuple[int, int]:
    """Rows and columns of the weights that are rounded together."""
    rows, columns = tile_of(take("tile") or ("256x1" if weights == 1 else "128x2"))
    tile = f"--tile {rows}x{columns}"
    if columns % weights:
        why = f"--wbits {bits}" if bits % 1 else f"--trellis_code {take('trellis_code')}"
        raise UsageError(
            f"{tile} with {why}: a step is of two neighbours in a row; say an even number of "
            "columns, such as 128x2"
        )
    if bits * columns > WIDEST:
        raise UsageError(
            f"{tile} --wbits {bits}: a row of it has {bits * columns:g} bits, and {WIDEST} are the "
            f"most; say {WIDEST // round(bits * weights) * weights} columns or fewer"
        )
    if (held := rows * columns * bits) < states:
        raise UsageError(
            f"{tile} --wbits {bits}: its {held:g} bits are fewer than the {states} of a state; say "
            "a larger one, or fewer --trellis_states"
        )
    if columns > 1 and take("quant") == "ldlbal_admm":
        raise UsageError(
            f"--quant ldlbal_admm with {tile}: it bounds the feedback of single columns; say one "
            "column, or ldlq"
        )
    return rows, columns


def _trellis(**options: Any) -> "Trellis":
    from quip.codebooks import Trellis

    return Trellis(**options)
