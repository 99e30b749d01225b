"""Hadamard matrices of nearly every order that a model needs.

Three constructions make them: Paley's over a finite field, Williamson's from sign strings, and
Kronecker products of smaller ones, which alone give the powers of two (Sylvester).
"""

import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import torch
from jaxtyping import Int8
from torch import Tensor

from quip.errors import UsageError

LARGEST = 1024  # order of an outer factor: beyond it, its dense product is no longer cheap
# The first halves of the first rows of the circulants A, B, C, D; a set bit is +1.
WILLIAMSON = {
    52: (0x53, 0x47, 0x69, 0x42),
    116: (0x64BB, 0x7B47, 0x5197, 0x7194),
    124: (0x9D21, 0x9D21, 0x83A9, 0xFC56),
    156: (0xE504C, 0xF130A, 0xE68A4, 0x8D41D),
    172: (0x233D76, 0x37E14D, 0x3ACAF4, 0x31E930),
}


def check(n: int, block: int | None = None) -> None:
    """Raises UsageError, with a remedy, if there is no rotation of n numbers."""
    if block is not None and (block < 1 or n % block):
        raise UsageError(f"a Hadamard block of {block} does not divide the width {n}; {_remedy(n)}")
    width = n if block is None else block
    if _factors(width) is None:
        raise UsageError(f"no Hadamard rotation of width {width} is known; {_remedy(n)}")


def factors(n: int) -> tuple[int, ...]:
    """(K ..., 2^p): orders with the product n, whose matrices make Omega_n, K the outermost.

    For n = 2^a q with an odd q, K is the smallest order 2^j q that `matrix` knows; for the widths
    that QuIP# serves it is QuIP#'s as well. If none up to LARGEST divides n, two or three orders
    share q, those with the smallest sum. Raises UsageError if there are none either.
    """
    check(n)
    found = _factors(n)
    assert found is not None
    return found


@cache
def matrix(order: int) -> Int8[Tensor, "order order"]:
    """K with entries +-1 and K K^T = order I. Raises UsageError if no construction gives one."""
    construct = _construction(order)
    if construct is None:
        raise UsageError(f"no Hadamard matrix of order {order} is known; a power of two has one")
    return construct().to(torch.int8)


def _remedy(n: int) -> str:
    block = math.gcd(n, 128)
    return f"give --hadamard_block {block}" if block >= 8 else "give --rotation kronecker"


@cache
def _factors(n: int) -> tuple[int, ...] | None:
    if _is_power_of_two(n):
        return (n,)
    divisors = [k for k in range(4, LARGEST + 1, 4) if n > 0 and n % k == 0]
    orders = [k for k in divisors if not _is_power_of_two(k) and _construction(k)]
    for counts in ((1,), (2, 3)):
        choices = [K for i in counts for K in itertools.combinations_with_replacement(orders, i)]
        rests = {K: n // math.prod(K) for K in choices if n % math.prod(K) == 0}
        served = [K for K, rest in rests.items() if _is_power_of_two(rest)]
        if served:
            K = min(served, key=lambda K: (sum(K), K))
            return *K, rests[K]
    return None


@cache
def _construction(order: int) -> Callable[[], Tensor] | None:
    """What makes `matrix(order)`. The precedence must not change: files hold signs for one K."""
    if order in (1, 2):
        return partial(torch.tensor, [[1]] if order == 1 else [[1, 1], [1, -1]])
    if order < 1 or order % 4:
        return None
    if order in WILLIAMSON:
        return partial(_williamson, order)
    if not _is_power_of_two(order):
        sizes = (order - 1, order // 2 - 1) if order % 8 else (order - 1,)
        fields = [field for q in sizes if (field := _field(q))]
        if fields:
            return partial(_paley, *min(fields, key=lambda field: field[1] > 1))  # primes first
    for a in range(2, math.isqrt(order) + 1):
        if order % a == 0 and _construction(a) and _construction(order // a):
            return partial(_product, a, order // a)
    return None


def _product(a: int, b: int) -> Tensor:
    return torch.kron(matrix(a), matrix(b))


def _williamson(order: int) -> Tensor:
    """Symmetric circulants of size k as quaternions: entries i and k - i of a first row agree."""
    k = order // 4
    right = (torch.arange(k) - torch.arange(k)[:, None]) % k
    shift = k // 2 - torch.minimum(right, k - right)
    A, B, C, D = ((bits >> shift & 1) * 2 - 1 for bits in map(torch.tensor, WILLIAMSON[order]))
    rows = [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _paley(p: int, k: int) -> Tensor:
    """From C = [[0, +-1], [1, Q]], Q_ij = chi(a_i - a_j) over the q = p^k elements of a field.

    I + C of order q + 1 if q = 3 mod 4; otherwise C + I and C - I fill order 2 (q + 1).
    Here chi is 0 for 0, +1 for other squares, else -1; a_i are the digits of i in base p.
    """
    q, weights = p**k, torch.tensor([p**i for i in reversed(range(k))])
    chi = torch.full((q,), -1)
    chi[(torch.tensor(_squares(p, k)) * weights).sum(-1)] = 1
    chi[0] = 0
    digits = torch.tensor([*itertools.product(range(p), repeat=k)])
    C, eye = torch.ones(q + 1, q + 1, dtype=torch.int64), torch.eye(q + 1, dtype=torch.int64)
    C[0, 0], C[0, 1:] = 0, 1 if q % 4 == 1 else -1
    C[1:, 1:] = chi[((digits[:, None] - digits) % p * weights).sum(-1)]
    if q % 4 == 3:
        return C + eye
    return torch.cat([torch.cat([C + eye, C - eye], dim=1), torch.cat([C - eye, -C - eye], dim=1)])


def _squares(p: int, k: int) -> list[tuple[int, ...]]:
    """The nonzero squares of GF(p^k), polynomials in x: the even powers of x.

    The field is what the first rule x^k = c_0 + c_1 x + ... makes under which the powers of x are
    all its elements but 0.
    """
    rules = itertools.product(range(1, p), *[range(p)] * (k - 1))
    return next(powers for c in rules if len(powers := _powers(p, c)) == p**k - 1)[::2]


def _powers(p: int, c: tuple[int, ...]) -> list[tuple[int, ...]]:
    """1, x, x^2 ... until 1 returns, where x^k = c_0 + c_1 x + ... modulo p."""
    powers: dict[tuple[int, ...], None] = {}
    power = (1,) + (0,) * (len(c) - 1)
    while power not in powers:
        powers[power] = None
        *low, top = power
        power = tuple((a + top * b) % p for a, b in zip((0, *low), c, strict=True))
    return list(powers)


def _field(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p a prime."""
    p = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
