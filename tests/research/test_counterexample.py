"""The finite-grid counterexample: the specification's digits, and what else does on it."""

from decimal import Decimal

import pytest
import torch

from quip.matrix.methods import METHODS
from quip.research.theory.counterexample import VARIANTS, construction, measure, plot_losses
from tests import reference as ref


def printed(number: str):
    """A number of a table, to within half a unit of its last digit."""
    half_unit = 0.5 * 10.0 ** int(Decimal(number).as_tuple().exponent)
    return pytest.approx(float(number), abs=half_unit)


def losses(n: int, *methods: str, **options) -> list[float]:
    [size] = measure([n], methods, **options)
    return [size.losses[name] for name in methods]


@pytest.mark.parametrize(("n", "c"), [(3, 0.01), (16, 0.01), (50, 0.2)])
def test_the_construction_is_the_papers(n, c):
    for ours, expected in zip(
        construction(n, 5, c=c), ref.counterexample(n, c=c, m=5), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("n", "clamped", "unclamped", "near", "from_the_end", "trace_ratio"),
    [
        (16, "634.0", "58.95", "59.85", "59.81", "0.5161"),
        (64, "14642", "247.1", "251.1", "251.07", "0.5039"),
        (256, "254996", "999.9", "1016.1", "1016.01", "0.5010"),
        (1024, "4.1655e6", "4010.9", "4076.1", "4076.04", "0.5002"),
    ],
)
def test_clamping_in_optq_order_breaks_ldlq_on_the_counterexample(
    n, clamped, unclamped, near, from_the_end, trace_ratio
):
    [size] = measure([n], ["gptq", "unclamped", "nearest", "ldlq"])
    assert list(size.losses.values()) == [
        printed(clamped),
        printed(unclamped),
        printed(near),
        printed(from_the_end),
    ]
    assert size.trace_ratio == printed(trace_ratio)
    if n <= 256:
        assert losses(n, "gptq", bits=2) == [printed(clamped)]


def test_losses_grow_with_the_rows_which_may_be_as_many_as_columns():
    [sixteen], [one] = losses(48, "gptq"), losses(48, "gptq", rows=1)
    assert sixteen == pytest.approx(16 * one)
    assert losses(48, "gptq", rows=None) == [pytest.approx(48 * one)]


def test_greedy_passes_and_bounded_feedback_do_not_fall_for_it():
    [size] = measure([100], list(VARIANTS))
    near = size.losses.pop("nearest")
    assert size.losses.pop("gptq") > 50 * near
    assert set(size.losses) == {*METHODS, "unclamped", "gptq+greedy"} - {"gptq", "nearest"}
    assert all(loss < 1.02 * near for loss in size.losses.values())


def test_losses_over_n_are_a_picture(tmp_path):
    plot_losses(list(measure([16, 8], ["gptq", "ldlq"])), tmp_path / "a.png")
    plot_losses(list(measure([16], ["gptq"], rows=None)), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "b.png").stat().st_size > 1000
