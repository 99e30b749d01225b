"""The solver stays within its budget, and within 0.1 % of what dynamic programming finds."""

import numpy as np
import pytest
from scipy.stats import norm

from quip.errors import UsageError
from quip.model.allocation import Option, allocate

# MSE of learned trellis codes of 2^12 states, by twice the bits per weight.
D = {2: 0.275, 3: 0.143, 4: 0.0707, 5: 0.0394, 6: 0.0185, 7: 0.0113, 8: 0.0049}
HALVES, WHOLE = tuple(D), (2, 4, 6, 8)
MATRICES = 210


def problem(spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes, and damages per unit of error: log-normal per weight, with the quantiles of one."""
    rng = np.random.default_rng(seed)
    scores = norm.ppf((np.arange(MATRICES) + 0.5) / MATRICES)
    sizes = rng.permutation(MATRICES // 5 * [1, 1, 3, 8, 8])
    return sizes, sizes * np.exp(spread * scores)


def options(sizes: np.ndarray, a: np.ndarray, widths: tuple[int, ...]) -> list[list[Option]]:
    return [
        [Option(bits=int(n * b), damage=float(x * D[b])) for b in widths]
        for n, x in zip(sizes, a, strict=True)
    ]


def spent(groups: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    picked = [group[index] for group, index in zip(groups, chosen, strict=True)]
    return sum(one.bits for one in picked), sum(one.damage for one in picked)


def least_damage(groups: list[list[Option]], budget: int) -> float:
    """By dynamic programming over every number of bits."""
    best = np.full(budget + 1, np.inf)
    best[0] = 0
    for group in groups:
        after = np.full(budget + 1, np.inf)
        for one in group:
            if one.bits <= budget:
                reached = best[: budget + 1 - one.bits] + one.damage
                np.minimum(after[one.bits :], reached, out=after[one.bits :])
        best = after
    return float(best.min())


# Damage over that of one width for all, at 2, 2.5 and 3 bits.
PUBLISHED = {
    (0.5, WHOLE): (0.943, 0.897, 0.941),
    (0.5, HALVES): (0.921, 0.867, 0.934),
    (1.0, WHOLE): (0.662, 0.614, 0.670),
    (1.0, HALVES): (0.647, 0.598, 0.666),
    (1.5, WHOLE): (0.372, 0.355, 0.435),
    (1.5, HALVES): (0.365, 0.348, 0.433),
}


@pytest.mark.parametrize(("spread", "widths"), PUBLISHED)
def test_the_solver_is_as_good_as_dynamic_programming(spread, widths):
    gains = []
    for seed in range(3):
        sizes, a = problem(spread, seed)
        groups, even = options(sizes, a, widths), a.sum()
        for bits in (4, 5, 6):
            budget = bits * int(sizes.sum())
            used, damage = spent(groups, allocate(groups, budget))
            exact = least_damage(groups, budget)
            assert used <= budget
            assert exact <= damage * (1 + 1e-12)
            assert damage <= 1.001 * exact
            gains.append(damage / (even * D[bits]))
    # Sizes and damages were drawn for the table, and no draw is the same as another.
    found = np.array(gains).reshape(3, 3).mean(0)
    assert found == pytest.approx(np.array(PUBLISHED[spread, widths]), abs=0.03)


@pytest.mark.parametrize(("widths", "bits"), [(HALVES, 4), (HALVES, 5), (WHOLE, 6)])
def test_equal_damages_per_weight_get_one_width(widths, bits):
    sizes, _ = problem(1.0, 0)
    groups = options(sizes, sizes * 0.3, widths)
    chosen = allocate(groups, bits * int(sizes.sum()))
    assert {widths[index] for index in chosen} == {bits}


def test_the_ends_of_the_budget_are_the_ends_of_the_options():
    sizes, a = problem(1.0, 0)
    groups, total = options(sizes, a, HALVES), int(sizes.sum())
    assert {*allocate(groups, 2 * total)} == {0}
    assert {*allocate(groups, 8 * total)} == {len(HALVES) - 1}
    for budget in (2 * total - 1, 8 * total + 1):
        reach = f"a budget of {budget} bits: the options take {2 * total} to {8 * total}; ask"
        with pytest.raises(UsageError, match=reach):
            allocate(groups, budget)


def test_what_costs_more_and_is_no_better_is_not_taken():
    worse = [Option(bits=2, damage=1.0), Option(bits=3, damage=1.0), Option(bits=4, damage=2.0)]
    useful = [Option(bits=2, damage=1.0), Option(bits=4, damage=0.5)]
    assert allocate([worse, useful], 8) == [0, 1]
    assert allocate([worse, useful], 5) == [0, 0]


def test_what_is_left_goes_to_an_option_above_the_hull():
    bent = [Option(bits=0, damage=1.0), Option(bits=5, damage=0.9), Option(bits=10, damage=0.0)]
    assert allocate([bent], 9) == [1]
    assert allocate([bent], 10) == [2]
