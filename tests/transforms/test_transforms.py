import pytest
import torch
from torch import Tensor

from quip.errors import QuipError
from quip.transforms import (
    Chain,
    Kronecker,
    KroneckerDraw,
    Rescale,
    RescaleDraw,
    Transform,
)
from quip.transforms.haar import FILE_DTYPE
from tests import reference as ref
from tests.laws import TRANSFORMS, assert_near, check_transform, permutation_bits, rotation_bits

SHAPES = [(12, 20), (40, 18), (7, 13), (1, 24), (9, 1), (3, 131)]
KRONECKER = pytest.mark.parametrize(
    "draw",
    [KroneckerDraw(), KroneckerDraw(blocked=True), KroneckerDraw(blocked=True, permute=False)],
    ids=["1", "0", "2"],
)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("draws", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_obey_the_laws(problem, draws, m, n, request):
    if "hadamard" in request.node.callspec.id:  # sizes that have a Hadamard matrix
        m, n = 4 * m, 4 * n - 4 * n % 16 + 16
    check_transform(draws, *problem(m, n))


@pytest.mark.parametrize("draws", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_obey_the_laws_with_dead_inputs_and_few_tokens(problem, draws):
    check_transform(draws, *problem(12, 20, rank=3, dead=(0, 7)))


@pytest.mark.parametrize("draws", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_obey_the_laws_with_weights_that_are_zero(problem, draws):
    W, H = problem(12, 20)
    W[:, 3] = 0
    check_transform(draws, W, H)
    check_transform(draws, 0 * W, 1e3 * H)


def test_a_chain_undoes_its_links_last_first(problem, rng):
    W, H = problem(12, 20)
    T, W_t, _ = Chain.draw([RescaleDraw(), KroneckerDraw()], W, H, rng)
    rescale, kronecker = T.links
    assert_near(W_t, kronecker.apply(*rescale.apply(W, H))[0])
    assert_near(T.undo(W_t), rescale.undo(kronecker.undo(W_t)))
    assert T.tensors().keys() == rescale.tensors().keys() | kronecker.tensors().keys()
    assert all(isinstance(link, Transform) for link in T.links)


def test_each_link_is_drawn_for_what_the_links_before_it_left(problem, rng):
    seen = []

    class Spy(RescaleDraw):
        def __call__(self, W: Tensor, H: Tensor, rng: torch.Generator) -> Rescale:
            seen.append((W, H))
            return Rescale(torch.ones(20).double())

    W, H = problem(12, 20)
    _, W_t, H_t = Chain.draw([RescaleDraw(), Spy()], W, H, rng)
    assert torch.equal(seen[0][0], W_t)
    assert torch.equal(seen[0][1], H_t)


def test_an_empty_chain_changes_and_costs_nothing(problem):
    W, H = problem(12, 20)
    T = Chain()
    assert T.apply(W, H)[0] is W
    assert T.undo(W) is W
    assert T.tensors() == {}


def test_rescaling_balances_h_against_w(problem, rng):
    W, H = problem(12, 20)
    r = RescaleDraw()(W, H, rng).r
    expected = (H.diagonal() / (W.T @ W).diagonal()) ** 0.25
    # Stored in bfloat16: 8 significant bits. Its mean is 1, since only ratios matter.
    torch.testing.assert_close(r, expected / expected.mean(), rtol=2**-8, atol=0)
    assert torch.equal(r, r.to(FILE_DTYPE).double())


def test_rescaling_minimises_the_product_of_what_rounding_and_range_cost(problem, rng):
    W, H = problem(12, 20)

    def cost(T: Rescale) -> float:
        W_t, H_t = T.apply(W, H)
        return float(H_t.trace() * W_t.square().sum())

    best = RescaleDraw()(W, H, rng)
    for k in range(20):
        for factor in (0.97, 1.03):  # beyond the rounding of r to 8 bits, 0.4 %
            r = best.r.clone()
            r[k] *= factor
            assert cost(Rescale(r)) > cost(best)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_rescaling_ignores_the_units_of_w_and_h(problem, rng, scale):
    W, H = problem(12, 20)
    assert torch.equal(RescaleDraw()(W * 2.0**100, H * 2.0**-60, rng).r, RescaleDraw()(W, H, rng).r)
    assert bool(torch.isfinite(RescaleDraw()(W * scale, H / scale, rng).r).all())


def test_rescaling_gives_what_is_zero_an_average_factor(problem, rng):
    W, H = problem(12, 20, dead=(4,))
    W[:, [4, 9]] = 0
    r = RescaleDraw()(W, H, rng).r
    assert float(r.min()) > 1e-3  # where undo divides by r, nothing blows up
    expected = (H.diagonal().mean() / W.square().sum(0).mean()) ** 0.25
    others = [j for j in range(20) if j not in (4, 9)]
    scale = r[others] / (H.diagonal() / W.square().sum(0))[others] ** 0.25
    assert float(r[4] / scale.mean()) == pytest.approx(float(expected), rel=2**-7)  # 8 bits, twice


def test_rescaling_nothing_by_nothing_is_no_rescaling(problem, rng):
    W, H = problem(12, 20)
    assert torch.equal(RescaleDraw()(0 * W, 0 * H, rng).r, torch.ones(20, dtype=torch.float64))


@KRONECKER
def test_w_and_h_are_turned_by_dense_orthogonal_matrices(problem, rng, draw):
    W, H = problem(12, 20)
    T = draw(W, H, rng)
    R_out, R_in = (
        R.rotate(torch.eye(n, dtype=torch.float64)).T for R, n in ((T.R_out, 12), (T.R_in, 20))
    )
    W_t, H_t = T.apply(W, H)
    assert_near(R_in @ R_in.T, torch.eye(20, dtype=torch.float64), 1e-12)
    assert_near(R_out @ R_out.T, torch.eye(12, dtype=torch.float64), 1e-12)
    assert_near(W_t, R_out @ W @ R_in.T)
    assert_near(H_t, R_in @ H @ R_in.T)
    assert_near(T.undo(W), R_out.T @ W @ R_in)


@pytest.mark.parametrize(
    ("draw", "blocked", "permutations"),
    [
        (KroneckerDraw(), False, 3),
        (KroneckerDraw(blocked=True), True, 3),
        (KroneckerDraw(blocked=True, permute=False), True, 0),
    ],
)
def test_a_rotation_stores_its_vectors_signs_and_permutations(
    problem, rng, draw, blocked, permutations
):
    T = draw(*problem(35, 60), rng)
    owed = rotation_bits(35, blocked=blocked) + rotation_bits(60, blocked=blocked)
    if permutations:
        owed += permutation_bits(35) + 2 * permutation_bits(60)
    assert 8 * sum(x.nbytes for x in T.tensors().values()) == owed


def test_permutations_that_are_none_are_damage(problem, rng):
    T = KroneckerDraw()(*problem(12, 20), rng)
    tensors = T.tensors()
    tensors["permutations"] = torch.zeros_like(tensors["permutations"])
    with pytest.raises(QuipError, match=r"a permutation of 20 numbers is none: the file is dam"):
        Kronecker.restore(tensors, 12, 20, **T.options())


@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_factors_that_are_not_orthogonal_are_damage(problem, rng, value):
    T = KroneckerDraw()(*problem(12, 20), rng)
    tensors = T.tensors()
    tensors["factors"][0] = value  # a sign
    with pytest.raises(QuipError, match=r"no orthogonal matrix: the file is damaged"):
        Kronecker.restore(tensors, 12, 20, **T.options())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rescaling_that_is_not_positive_is_damage(value):
    with pytest.raises(QuipError, match=r"not positive: the file is damaged"):
        Rescale.restore({"rescale": torch.tensor([1.0, value])}, 3, 2)


def test_what_a_file_keeps_of_a_transform_is_what_was_used(problem, rng):
    T = KroneckerDraw()(*problem(12, 20), rng)
    for haar in (T.R_in.left, T.R_in.right, T.R_out.left, T.R_out.right):
        assert haar.vectors.dtype == FILE_DTYPE
        assert torch.equal(haar.vectors, haar.vectors.tril(-1))
        assert set(haar.signs.flatten().tolist()) <= {-1.0, 1.0}


def test_the_proxy_loss_is_the_same_in_both_bases(problem, rng):
    W, H = problem(12, 20)
    T, W_t, H_t = Chain.draw([RescaleDraw(), KroneckerDraw()], W, H, rng)
    W_hat = W_t.round()
    ours, theirs = ref.trace_loss(W_t, W_hat, H_t), ref.trace_loss(W, T.undo(W_hat), H)
    assert ours == pytest.approx(theirs, rel=1e-10)  # rounding noise times cond of the rescaling
