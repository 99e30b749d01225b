"""OPTQ and LDLQ side by side: the same codes, and the distances that say why."""

import pytest
import torch

from quip.research.theory import equivalence
from quip.research.theory.equivalence import DECADES, compare, compare_all, ldlq_targets, optq
from quip.research.theory.integers import grid
from tests import reference as ref


def test_theorem_6_optq_and_ldlq_in_its_order_give_identical_codes():
    found = compare(1000, 1000, None, seed=0)
    assert found.differing_codes == 0
    assert found.loss_optq == found.loss_ldlq
    assert found.largest_difference < 1e-11 < found.nearest_tie


@pytest.mark.parametrize("bits", [None, 2])
def test_optq_here_is_the_oracles(bits):
    W, H = ref.correlated_problem(9, 40)
    W_hat, targets = optq(3 * W, H, grid(bits))
    assert torch.equal(W_hat, ref.optq(3 * W, H, lambda _: lambda t: ref.nearest(t, bits)))
    assert torch.equal(ref.nearest(targets, bits), W_hat)


def test_targets_are_what_ldlq_rounds():
    W, H = ref.correlated_problem(9, 40)
    seen = []

    def rounded(t):
        seen.append(t)
        return ref.nearest(t)

    W_hat = ref.ldlq(W, H, rounded, ref.natural(H))
    targets = ldlq_targets(W, W_hat, H)
    torch.testing.assert_close(targets, torch.stack(seen, dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [None, 3, 1])
@pytest.mark.parametrize(("m", "n"), [(3, 65), (40, 17)])
def test_codes_are_equal_on_every_grid_and_shape(m, n, bits):
    found = compare(n, m, bits, seed=1)
    assert (found.n, found.rows, found.bits) == (n, m, bits)
    assert found.differing_codes == 0
    assert sum(found.difference_counts) == sum(found.tie_counts) == m * n


def test_codes_that_differ_are_counted(monkeypatch):
    def wrong(method, W, H, book):
        W_hat = optq(W, H, book)[0]
        W_hat[0, -1] += 1
        W_hat[2, -1] -= 2
        return W_hat

    monkeypatch.setattr(equivalence, "round_by", wrong)
    found = compare(20, 5, None, seed=0)
    assert found.differing_codes == 2
    assert found.loss_ldlq != found.loss_optq


def test_in_single_precision_targets_agree_to_its_rounding():
    found = compare(64, 20, None, seed=0, dtype=torch.float32)
    assert 1e-8 < found.largest_difference < 1e-4


def test_a_tie_is_half_way_between_two_codes():
    targets = torch.tensor([[-7.0, 0.5, 0.9, 2.2, 9.0]], dtype=torch.float64)
    unbounded = equivalence._tie_distances(targets, None)
    assert unbounded[0].tolist() == pytest.approx([0.5, 0, 0.4, 0.3, 0.5])
    clamped = equivalence._tie_distances(targets, 2)
    assert clamped[0].tolist() == pytest.approx([7.5, 0, 0.4, 0.3, 6.5])


def test_every_size_meets_every_grid_and_rows_follow_columns():
    found = list(compare_all([8, 12], [None, 2], rows=None, seed=0))
    assert [(c.n, c.rows, c.grid) for c in found] == [
        (8, 8, "whole numbers"),
        (8, 8, "2 bits"),
        (12, 12, "whole numbers"),
        (12, 12, "2 bits"),
    ]
    assert [c.rows for c in compare_all([8], [None], rows=3, seed=0)] == [3]
    assert "difference_counts" not in found[0].to_row()
    assert len(found[0].tie_counts) == len(DECADES) - 1


def test_distances_and_sizes_are_pictures(tmp_path):
    found = list(compare_all([8, 12], [None, 2], rows=None, seed=0))
    equivalence.plot_differences(found, tmp_path / "a.png")
    equivalence.plot_sizes(found, tmp_path / "b.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
