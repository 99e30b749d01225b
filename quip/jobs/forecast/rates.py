"""What this machine does in a second, by some two seconds of the very work that a run consists of.

Matrices are small beside those of large models. So what grows with the cube of a size is counted at
the rates of large products, and only what is left of a small matrix's time (rounding itself, and
Python) is taken to grow with its columns and its weights.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quip.evaluate.bandwidth import copy_rate, now
from quip.jobs.forecast.operations import sweeping
from quip.matrix.hessian import Hessian
from quip.matrix.linalg import proxy_loss
from quip.matrix.quantize import quantize_matrix
from quip.matrix.recipe import Recipe
from quip.matrix.seeds import rng_for
from quip.packed.linear import QuantizedLinear
from quip.packed.spec import Spec

SIZE = 1024  # of the products that are timed
TRIES = 3
COLUMNS = 384  # of the matrices that are quantized; a multiple of what lattices and tiles ask for
ROWS = (64, 512)
ENOUGH = 0.7  # seconds of one matrix, after which none with more rows is tried
PIECE = 2**26  # bytes that are read, or written
PASSES = 30  # over n^2 numbers of 8 bytes: means, copies, damping, orders
TURNS = 3  # a change of basis of both sides, of as many numbers, against one side's product


@dataclass(frozen=True)
class Left:
    """Seconds that are left of some work on a matrix once its products are taken off."""

    column: float  # for each of its columns
    weight: float  # for each of its weights

    def of(self, m: int, n: int) -> float:
        return n * self.column + m * n * self.weight

    @classmethod
    def fit(cls, seconds: Mapping[int, float]) -> "Left":
        """What fits the seconds by numbers of rows, of matrices of COLUMNS columns."""
        (m, first), *_ = seconds.items()
        most, last = max(seconds.items())
        growth = (last - first) / (most - m) if most > m else last / m
        weight = max(0.0, growth) / COLUMNS
        return cls(max(0.0, last / COLUMNS - most * weight), weight)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What a recipe takes beside its products, and what a file holds of a matrix."""

    quantize: Left
    forward: Left  # of a packed matrix, each time that tokens pass
    spec: Spec


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations or bytes a second."""

    product: float  # in the dtype of the run
    single: float  # products in float32
    double: float  # products in float64
    factor: float  # Cholesky's factorisation in float64
    observe: float  # X^T X, as operations of `observing`
    copy: float  # bytes inside the memory of the device, read and written
    read: float  # bytes of the weights' files
    write: float  # bytes of new files


def measured_rates(
    device: torch.device, dtype: torch.dtype, weights: Path | None, place: Path
) -> Rates:
    """The rates of a device, of the disk that a file of weights is on, and of that of a folder.

    Where there is no such file, it is taken to be read as fast as new ones are written.
    """
    write = _write_rate(place)
    x = torch.randn(2 * SIZE, SIZE, device=device)
    H = x.double().T @ x.double()
    hessian = Hessian(SIZE, device=device)
    observed = 5 / 8 * 2 * len(x) * SIZE**2
    return Rates(
        product=product_rate(device, dtype),
        single=product_rate(device, torch.float32),
        double=product_rate(device, torch.float64),
        factor=SIZE**3 / 3 / _least(device, lambda: torch.linalg.cholesky(H)),
        observe=observed / _least(device, lambda: hessian.update(x)),
        copy=copy_rate(device),
        read=_read_rate(weights) if weights else write,
        write=write,
    )


def product_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product."""
    device = torch.device(device)
    A = torch.randn(SIZE, SIZE, device=device).to(dtype)
    return 2 * SIZE**3 / _least(device, lambda: A @ A)


def measured_rounding(
    recipe: Recipe, rates: Rates, device: torch.device, dtype: torch.dtype
) -> Rounding:
    """Quantizes random matrices, of more and more rows as time allows, and multiplies by them."""
    x = torch.randn(2 * COLUMNS, COLUMNS, device=device)
    H, x = x.T.double() @ x.double(), x.to(dtype)
    _quantized(torch.randn(32, COLUMNS, device=device), H, recipe)  # kernels are compiled
    quantized, passed = dict[int, float](), dict[int, float]()
    for m in ROWS:
        W = torch.randn(m, COLUMNS, device=device)
        work = partial(_quantized, W, H, recipe)
        seconds, layer = _least(device, work, tries=2), work()
        quantized[m] = max(0.0, seconds - products(recipe, rates, m, COLUMNS))
        own = 2 * x.numel() * m / rates.product
        passed[m] = max(0.0, _least(device, partial(layer, x)) - own)
        if seconds > ENOUGH:
            break
    return Rounding(quantize=Left.fit(quantized), forward=Left.fit(passed), spec=layer.spec)


def products(recipe: Recipe, rates: Rates, m: int, n: int) -> float:
    """Seconds of a matrix's part that large products and passes over H are made of."""
    name = getattr(recipe.feedback, "__name__", "")
    factor = n**3 / 3 / rates.factor + (400.0 * n**3 / rates.double if "admm" in name else 0.0)
    turned = len(recipe.transforms) > 0
    basis = TURNS * 4.0 * (n + m) * n * n**0.5 / rates.double if turned else 0.0
    return (
        factor
        + basis
        + sweeping(recipe, m, n) / rates.single
        + 4.0 * m * n * n / rates.double  # the proxy loss
        + 8.0 * PASSES * n * n / rates.copy
    )


def _quantized(W: Tensor, H: Tensor, recipe: Recipe) -> QuantizedLinear:
    """All that a run does with one matrix."""
    quantized = quantize_matrix(W, H, recipe, rng=rng_for(0, "calibration"), f=W.new_ones(len(W)))
    proxy_loss(W, quantized.dequantize(), H)
    return QuantizedLinear.from_matrix(quantized, None)


def _least(device: torch.device, work: Callable[[], object], *, tries: int = TRIES) -> float:
    """The seconds of the fastest of so many tries, after one that is not counted if there are."""
    seconds = []
    for _ in range(tries + (tries > 1)):
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return min(seconds[tries > 1 :])


def _read_rate(path: Path) -> float:
    """Bytes a second from the middle of a file, from wherever the system has them."""
    size = path.stat().st_size
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        file.seek(max(0, size // 2 - PIECE // 2))
        count = len(file.read(PIECE))
    return count / max(1e-9, time.perf_counter() - start)


def _write_rate(place: Path) -> float:
    """Bytes a second into a file of a folder, or of the nearest above it that there is."""
    while not place.is_dir():
        place = place.parent
    if not os.access(place, os.W_OK):
        place = Path(tempfile.gettempdir())
    data = os.urandom(PIECE // 4)
    with tempfile.TemporaryFile(dir=place) as file, suppress(OSError):  # full: no rate to be had
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - start)
    return 1e9
