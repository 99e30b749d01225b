"""Decodes learned codebooks by docs/format.md alone, as format_reader.py does the rest."""

import math
from collections.abc import Callable, Mapping

import numpy as np

Unpack = Callable[[np.ndarray, int, int], np.ndarray]


def weights(
    own: Mapping[str, np.ndarray], codes: np.ndarray, n: int, book: Mapping, unpack: Unpack
) -> np.ndarray:
    """W~ of these codes [m, n / d]."""
    m, d, run = len(codes), book["dim"], book["run"]
    g = band(n, book["columns"], run or d)
    t = 1 if book["weights"] is None else max(1, round(m / max(1, round(book["weights"] / g))))
    sizes = [m // t + (i < m % t) for i in range(t)]
    tile = np.repeat(np.arange(t), sizes)[:, None]
    of_band = np.arange(n // d) * d // g
    W = entries(own, 2 ** (book["bits"] * d), book, unpack)[of_band, tile, codes].reshape(m, n)
    return W if run is None else W * scales(own, -(-n // run), book, unpack)[:, np.arange(n) // run]


def band(n: int, columns: int | None, unit: int) -> int:
    if columns is None or columns >= n:
        return n
    return min(n, math.ceil(n / max(1, round(n / columns)) / unit) * unit)


def entries(own: Mapping, k: int, book: Mapping, unpack: Unpack) -> np.ndarray:
    if book["entry_bits"] == 4:
        size, packed = k * book["dim"], own["centroids"]
        rows = [unpack(row, 4, size) - 8 for row in packed.reshape(-1, packed.shape[-1])]
        return np.stack(rows).reshape(*packed.shape[:2], k, book["dim"])
    if book["rank"] is not None:
        units = (own["left"] @ own["right"])[..., None]
    else:
        units = own["centroids"]
    return units * own["centroid_scale"][..., None, None]


def scales(own: Mapping, runs: int, book: Mapping, unpack: Unpack) -> np.ndarray:
    if book["entry_bits"] == 4:
        return own["units"]
    q = np.stack([unpack(row, 4, runs) for row in own["scale_codes"]])
    return 2.0 ** (own["scale_range"][:, 0] + own["scale_range"][:, 1] * q)
