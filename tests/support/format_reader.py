"""Decodes checkpoints by docs/format.md alone: nothing of quip is used, the tables are the text's.

`read` gives W_hat of every matrix in float64; everything is as slow as it is plain.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from tests.support import format_learned, format_trellis

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
PATTERNS = re.findall(r"\b[13]{8}\b", TEXT)
WILLIAMSON = {
    int(k): [int(x, 16) for x in re.findall(r"0x\w+", row)]
    for k, row in re.findall(r"\| (\d+) ((?:\| 0x\w+ )+)\|", TEXT)
}


def read(folder: Path, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """W_hat of each matrix of a checkpoint by name; sizes are the (m, n) of each."""
    words = json.loads((folder / "config.json").read_text())["quantization_config"]
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"].values() if index.exists() else ()
    tensors: dict[str, Any] = {}
    for file in set(files) or ["model.safetensors"]:
        tensors |= load_file(folder / file)
    found = {}
    for spec in words["specs"] if words["format"] == 2 else [words]:
        for name in spec["modules"]:
            found[name] = matrix(spec, part(tensors, name), *sizes[name])
        for names in spec.get("stacks", []):
            rows = [sizes[name][0] for name in names]
            own = part(tensors, f"{names[0]}.stack")
            whole = matrix(spec, own, sum(rows), sizes[names[0]][1])
            members = np.split(whole, np.cumsum(rows)[:-1])
            found |= {k: s * W for k, s, W in zip(names, own["scales"], members, strict=True)}
    return found


def part(tensors: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    own = {k.rpartition(".")[2]: x for k, x in tensors.items() if k.rpartition(".")[0] == name}
    return {k: (x.double() if x.is_floating_point() else x).numpy() for k, x in own.items()}


def matrix(spec: Mapping[str, Any], own: Mapping[str, np.ndarray], m: int, n: int) -> np.ndarray:
    book = spec["codebook"]
    W = BOOKS[book["kind"]](own, m, n, book)
    for transform in reversed(spec["transforms"]):
        W = UNDO[transform["kind"]](W, own, transform)
    return W


def learned(own: Mapping, m: int, n: int, book: Mapping) -> np.ndarray:
    codes = np.stack(
        [unpack(x, book["bits"] * book["dim"], n // book["dim"]) for x in own["codes"]]
    )
    return format_learned.weights(own, codes, n, book, unpack)


def trellis(own: Mapping, m: int, n: int, book: Mapping) -> np.ndarray:
    V = format_trellis.weights_per_step(book)
    codes = np.stack([unpack(x, round(book["bits"] * V), n // V) for x in own["codes"]])
    return format_trellis.weights(own, codes, n, book)


def unpack(row: np.ndarray, bits: int, count: int) -> np.ndarray:
    data, start, low, codes = row.astype("<i4").tobytes(), 0, 0, np.zeros(count, dtype=np.int64)
    for width in (8, 4, 2, 1):
        while bits - low >= width:
            size = math.ceil(count * width / 8)
            for j in range(count):
                byte = data[start + j % size] >> (j // size * width)
                codes[j] |= (byte & (2**width - 1)) << low
            start, low = start + size, low + width
    return codes


def grid(own: Mapping, m: int, n: int, book: Mapping) -> np.ndarray:
    bits, group = book["bits"], np.arange(n) // (book["group"] or n)
    codes, zero = np.stack([unpack(row, bits, n) for row in own["codes"]]), (2**bits - 1) / 2
    if book["symmetric"] == "signed":
        zero = 2 ** (bits - 1)
    if not book["symmetric"]:
        zero = unpack(own["zero"], bits, m * (group[-1] + 1)).reshape(m, -1)[:, group]
    return own["step"][:, group] * (codes - zero)


def lattice(own: Mapping, m: int, n: int, book: Mapping) -> np.ndarray:
    bits, E8P = {"E8P12": 16, "E8P12RVQ3B": 24, "E8P12RVQ4B": 32}[book["name"]], e8p()
    codes = np.stack([unpack(row, bits, n // 8) for row in own["codes"]])
    points = E8P[codes & 0xFFFF]
    if bits > 16:
        points = points + (E8P if bits == 32 else e81b())[codes >> 16] / book["ratio"]
    return own["scale"][np.arange(n) // (book["group"] or n)] * points.reshape(m, n)


def vectors(*entries: float, length: int = 8) -> np.ndarray:
    return np.array([*itertools.product(entries, repeat=length)])


@cache
def e8p() -> np.ndarray:
    rows = vectors(0.5, 1.5, 2.5)
    patterns = np.array([[int(digit) / 2 for digit in row] for row in PATTERNS])
    rows = np.concatenate([rows[(rows**2).sum(1) <= 10], patterns])
    rows[rows.sum(1) % 2 == 1, 7] *= -1
    low = np.arange(256)
    bits = low[:, None] >> np.arange(8) & 1
    odd = bits.sum(1) % 2
    bits[:, 0] ^= odd
    signs = np.empty((256, 8))
    signs[:, [0, 2, 4, 6, 1, 3, 5, 7]] = 1 - 2 * bits
    return (rows[:, None] * signs + (0.25 - 0.5 * odd)[:, None]).reshape(-1, 8)


def e81b() -> np.ndarray:
    whole, half, eye = vectors(-1, 0, 1), vectors(-0.5, 0.5), 2 * np.eye(8)
    whole = whole[np.isin((whole**2).sum(1), [0, 2])]
    return np.concatenate([whole, half[half.sum(1) % 2 == 0], eye, -eye[:7]])


def rescale(W: np.ndarray, own: Mapping, options: Mapping) -> np.ndarray:
    return W / own["rescale"]


def rescale_out(W: np.ndarray, own: Mapping, options: Mapping) -> np.ndarray:
    return W * own["rescale_out"][:, None]


def kronecker(W: np.ndarray, own: Mapping, options: Mapping) -> np.ndarray:
    (m, n), permute = W.shape, options["permute"]
    numbers, words = iter(own["factors"]), iter(own.get("permutations", ()))
    R_in = rotation(n, numbers, words, options["blocked"], permute, permute)
    return rotation(m, numbers, words, options["blocked"], permute, False).T @ W @ R_in


def rotation(n: int, numbers: Any, words: Any, blocked: bool, first: bool, last: bool) -> Any:
    p = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    q = n // p
    L = np.stack([factor(p, numbers) for _ in range(q if blocked else 1)])
    R = np.stack([factor(q, numbers) for _ in range(p if blocked else 1)])
    P, P_ = (permutation(n, words) if given else np.arange(n) for given in (first, last))
    U = np.eye(n)[:, P].reshape(n, p, q)  # of each basis vector: its R x is a column of R
    Y = np.einsum("jik,bkj->bij", np.broadcast_to(L, (q, p, p)), U)
    V = np.einsum("ijk,bik->bij", np.broadcast_to(R, (p, q, q)), Y)
    return V.reshape(n, n)[:, P_].T


def factor(k: int, numbers: Any) -> np.ndarray:
    triangle, made = np.zeros((k, k)), np.eye(k)
    for i in range(k):
        triangle[i, : i + 1] = [next(numbers) for _ in range(i + 1)]
    for i in range(k - 1):
        v = np.concatenate([np.zeros(i), [1], triangle[i + 1 :, i]])
        made = made @ (np.eye(k) - 2 * np.outer(v, v) / (v @ v))
    return made * triangle.diagonal()


def permutation(n: int, words: Any) -> np.ndarray:
    bits = max(1, (n - 1).bit_length())
    size = sum(math.ceil(n * w / 8) for w in [8] * (bits // 8) + [w for w in (4, 2, 1) if bits & w])
    return unpack(np.array([next(words) for _ in range(math.ceil(size / 4))]), bits, n)


def hadamard(W: np.ndarray, own: Mapping, options: Mapping) -> np.ndarray:
    left, right = (omega(size, options["block"]) for size in W.shape)
    return own["signs_out"][:, None] * (left @ W @ right.T) * own["signs_in"]


def omega(n: int, block: int | None = None) -> np.ndarray:
    width = block or n
    orders = [k for k in range(4, min(width, 1024) + 1, 4) if width % k == 0 and not power(k)]
    orders = [] if power(width) else [k for k in orders if order(k) is not None]
    choices: list[tuple[int, ...]] = [()] if power(width) else []
    for counts in ((1,), (2, 3)):
        sets = [K for i in counts for K in itertools.combinations_with_replacement(orders, i)]
        choices = choices or [K for K in sets if power(width / math.prod(K))]
    K = min(choices, key=lambda K: (sum(K), K))
    made = sylvester(width // math.prod(K))
    for k in reversed(K):
        made = np.kron(order(k), made)
    return np.kron(np.eye(n // width), made) / math.sqrt(width)


def power(n: float) -> bool:
    return n >= 1 and math.log2(n).is_integer()


def sylvester(k: int) -> np.ndarray:
    return np.ones((1, 1)) if k == 1 else np.kron([[1, 1], [1, -1]], sylvester(k // 2))


@cache
def order(k: int) -> np.ndarray | None:
    if k in (1, 2):
        return sylvester(k)
    if k % 4:
        return None
    if k in WILLIAMSON:
        c = k // 4
        d = (np.arange(c) - np.arange(c)[:, None]) % c
        shift = c // 2 - np.minimum(d, c - d)
        A, B, C, D = ((bits >> shift & 1) * 2 - 1 for bits in WILLIAMSON[k])
        return np.block([[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]])
    possible = [] if power(k) else [k - 1] if k % 8 == 0 else [k - 1, k // 2 - 1]
    fields = [(e > 1, q != k - 1, q, p, e) for q in possible for p, e in prime_powers(q)]
    if fields:
        *_, q, p, e = min(fields)
        C = paley(q, p, e)
        eye = np.eye(q + 1)
        return C + eye if q == k - 1 else np.block([[C + eye, C - eye], [C - eye, -C - eye]])
    pairs = ((order(a), order(k // a)) for a in range(2, math.isqrt(k) + 1) if k % a == 0)
    return next((np.kron(a, b) for a, b in pairs if a is not None and b is not None), None)


def prime_powers(q: int) -> list[tuple[int, int]]:
    p = next(d for d in range(2, q + 1) if q % d == 0)
    return [(p, e) for e in range(1, 12) if p**e == q]


def paley(q: int, p: int, e: int) -> np.ndarray:
    elements, place = vectors(*range(p), length=e), p ** np.arange(e)[::-1]
    found = next(x for rule in elements if len(x := powers_of_x(p, rule)) == q - 1)
    chi = np.full(q, -1)
    chi[np.array(found[::2]) @ place] = 1
    chi[0] = 0
    C = np.ones((q + 1, q + 1))
    C[0, 0], C[0, 1:] = 0, 1 if q % 4 == 1 else -1
    C[1:, 1:] = chi[(elements[:, None] - elements) % p @ place]
    return C


def powers_of_x(p: int, rule: np.ndarray) -> list[tuple[int, ...]]:
    power, found = (1,) + (0,) * (len(rule) - 1), dict[tuple[int, ...], None]()
    while power not in found:
        found[power] = None
        power = tuple((np.array((0, *power[:-1])) + power[-1] * rule) % p)
    return [*found]


BOOKS = {"grid": grid, "lattice": lattice, "learned": learned, "trellis": trellis}


def ordered(W: np.ndarray, own: Mapping, transform: Mapping) -> np.ndarray:
    return W[:, np.argsort(permutation(W.shape[1], iter(own["order"])))]


UNDO = {"rescale": rescale, "rescale_out": rescale_out, "order": ordered}
UNDO |= {"kronecker": kronecker, "hadamard": hadamard}
