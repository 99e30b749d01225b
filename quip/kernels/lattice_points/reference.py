"""Points of the lattices E8P and E81B in torch: the nearest ones, and those of codes.

A code has one or two stages, each with the tables of its lattice. The second one rounds what the
first one left, magnified by `ratio`:

    w_hat = scale (q_0 + q_1 / ratio),   q_0 = Q_0(w / scale),   q_1 = Q_1((w / scale - q_0) ratio)

and the code is c_0 | c_1 << 16. How points are numbered is told in codebooks/e8p.py and e81b.py.

For one shift of E8P, z = x -+ 1/4 and the sum of v even, the nearest v is found without a search:
its magnitudes have one of seven shapes, or are one of 29 patterns of squared norm 12.
"""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Int32, Int64, Integer
from torch import Tensor

from quip.kernels.groups import spread
from quip.kernels.lattice_points.tables import DIM, E8P, E81B, Stage, code_bits, code_dtype

CHUNK = 2**14  # vectors whose distances to all points of E81B are in memory together
# How many halves become 3/2 (1) or 5/2 (2), largest |z| first. A shape of odd sum has to change
# one sign more, or less, than z does.
SHAPES = ("00000000", "10000000", "11000000", "11100000", "11110000", "20000000", "21000000")


def nearest(
    x: Float[Tensor, "m 8"],
    stages: Sequence[Stage],
    *,
    scale: Float[Tensor, ""],
    ratio: float | None,
) -> Integer[Tensor, " m"]:
    """The code of x / scale, and with two stages that of what is left of it times ratio."""
    x = x / scale
    codes = nearest_of(x, stages[0])
    if ratio is None:
        return codes
    left = (x - points_of(codes, stages[0], x.dtype)) * ratio
    return codes | nearest_of(left, stages[1]).to(code_dtype(code_bits(stages))) << 16


def decode(
    codes: Integer[Tensor, "m k"],
    stages: Sequence[Stage],
    scales: Float[Tensor, " groups"],
    *,
    group: int | None,
    ratio: float | None,
) -> Float[Tensor, "m n"]:
    """scale (q_0 + q_1 / ratio), 8 columns a code; each scale serves `group` codes of a row."""
    points = points_of(codes & 0xFFFF, stages[0], scales.dtype)  # [m, k, 8]
    if ratio is not None:
        points += points_of(codes >> 16, stages[1], scales.dtype).div_(ratio)
    return points.mul_(spread(scales[None], group, codes.shape[1]).unsqueeze(-1)).flatten(1)


def nearest_of(x: Float[Tensor, "m 8"], stage: Stage) -> Int32[Tensor, " m"]:
    """The codes of the points of one stage nearest to x; half precision counts as float32."""
    x = x.float() if x.dtype.itemsize < 4 else x
    return _nearest_e8p(x, stage) if isinstance(stage, E8P) else _nearest_e81b(x, stage)


def points_of(
    codes: Integer[Tensor, "*k"], stage: Stage, dtype: torch.dtype
) -> Float[Tensor, "*k 8"]:
    """The points of one stage, exactly."""
    codes = codes.long()
    if isinstance(stage, E81B):
        return stage.points[codes].to(dtype)
    v = stage.magnitudes[codes >> 8] * stage.signs[codes & 255]
    return (v + stage.shifts[codes & 255].unsqueeze(-1)).to(dtype)


def _nearest_e81b(x: Float[Tensor, "m 8"], stage: E81B) -> Int32[Tensor, " m"]:
    points = stage.points.to(x)
    norms = points.square().sum(1) / 2
    found = [torch.addmm(-norms, y, points.T).argmax(1) for y in x.split(CHUNK)]
    return torch.cat(found).int() if found else x.new_empty(0, dtype=torch.int32)


def _nearest_e8p(x: Float[Tensor, "m 8"], stage: E8P) -> Int32[Tensor, " m"]:
    x, shift = x.unsqueeze(0), x.new_tensor([0.25, -0.25]).view(2, 1, 1)
    digits, negative, gain = _nearest_of_shift(x - shift, stage.patterns)
    total = gain + (shift * x).sum(-1)
    minus = total[1] > total[0]
    digits, negative = (
        torch.where(minus[:, None], pair[1], pair[0]) for pair in (digits, negative)
    )
    index = (digits * _powers(x.device)).sum(-1)
    bits = (negative * stage.sign_bits).sum(-1)
    return (stage.code_of[index] ^ bits ^ minus).int()


def _nearest_of_shift(
    z: Float[Tensor, "s m 8"], patterns: Int64[Tensor, "29 8"]
) -> tuple[Int64[Tensor, "s m 8"], Tensor, Float[Tensor, "s m"]]:
    """|v| - 1/2 and the signs of the v nearest to z, and <v, z> - |v|^2 / 2 + 1.

    With a = |z| sorted, v = 1/2 everywhere gains <a, 1/2>, each 3/2 a_j - 1 more, a 5/2 2 a_1 - 3.
    An odd sum costs a_8: the smallest changes its sign.
    """
    negative = z < 0
    a, order = z.abs().sort(dim=-1, descending=True)
    odd = negative.sum(-1) % 2  # [s, m]: of |v| = 1/2 with the signs of z
    sums = (a - 1).cumsum(-1)
    first, second, last = a[..., 0], a[..., 1], a[..., 7]
    gains = [torch.zeros_like(first), *sums[..., :4].unbind(-1)]
    gains += [2 * first - 3, 2 * first + second - 4]
    shapes = _shapes(z.device)
    parity = shapes.sum(-1) % 2
    costs = (parity != odd.unsqueeze(-1)) * last.unsqueeze(-1)
    gain, shape = (torch.stack(gains, dim=-1) - costs).max(-1)
    digits = torch.empty_like(order).scatter_(-1, order, shapes[shape])
    flips = (parity[shape] != odd).unsqueeze(-1)
    negative = negative.scatter(-1, order[..., 7:], negative.gather(-1, order[..., 7:]) ^ flips)
    promising = sums[..., 4] - (odd == 0) * last > gain  # about 6 % of Gaussian vectors
    if promising.any():
        found = _nearest_pattern(z[promising], patterns)
        better = found[2] > gain[promising]
        for old, new in zip((digits, negative, gain), found, strict=True):
            shape_of = better.view(-1, *[1] * (new.ndim - 1))
            old[promising] = torch.where(shape_of, new, old[promising])
    return digits, negative, gain + a.sum(-1) / 2


def _nearest_pattern(
    z: Float[Tensor, "k 8"], patterns: Int64[Tensor, "29 8"]
) -> tuple[Int64[Tensor, "k 8"], Tensor, Float[Tensor, " k"]]:
    """What `_nearest_of_shift` finds, among the 29 patterns alone, whose |v| sum to 9.

    The gain is over |v| = 1/2 everywhere.
    """
    a, negative = z.abs(), z < 0
    even = negative.sum(-1) % 2 == 0  # then one sign has to change: that of the least a_i |v_i|
    costs = (a.unsqueeze(1) * (patterns + 0.5).to(a)).amin(-1)  # [k, 29]
    gain, which = (a @ patterns.T.to(a) - 5 - 2 * even.unsqueeze(1) * costs).max(-1)
    digits = patterns[which]
    flipped = (a * (digits + 0.5).to(a)).argmin(-1, keepdim=True)
    negative = negative.scatter(-1, flipped, negative.gather(-1, flipped) ^ even.unsqueeze(1))
    return digits, negative, gain


@cache
def _shapes(device: torch.device) -> Int64[Tensor, "7 8"]:
    return torch.tensor([[int(digit) for digit in row] for row in SHAPES], device=device)


@cache
def _powers(device: torch.device) -> Int64[Tensor, " 8"]:
    return 3 ** torch.arange(DIM - 1, -1, -1, device=device)
