"""What is written down of a run: each quantized matrix, seconds by stage, and versions."""

import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from quip.reading import parse_json

Item = TypeVar("Item")
PACKAGES = ("quip-quant", "torch", "transformers", "datasets", "numpy", "safetensors", "lm-eval")


@dataclass(frozen=True, kw_only=True)
class MatrixRecord:
    """What quantizing one matrix came to."""

    name: str
    block: int
    rows: int
    columns: int
    proxy_loss: float  # relative, original basis, undamped H, by which the matrix was rounded
    damp: float  # as used
    bits_per_weight: float  # all overheads included
    seconds: float
    target_loss: float | None = None  # as proxy_loss, against the target; None: that is the weights
    target_share: float | None = None  # alpha of W + alpha (W* - W)
    tokens: int | None = None  # that the router sent to an expert; None: of no expert
    plain_loss: float | None = None  # as proxy_loss, all tokens alike; None: as they are there
    two_sided: bool | None = None  # whether outputs were looked at; None: they never are
    damage: float | None = None  # 1/2 E[|g|^2 |(W_hat - W) x|^2] / rows, in nats per token


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def each(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with the time taken to come by them counted as `stage`."""
        iterator, done = iter(items), object()
        while True:
            with self(stage):
                item = next(iterator, done)
            if item is done:
                return
            yield item  # type: ignore[misc]


def parse_records(kind: type[Item], text: str) -> list[Item]:
    """The records of this kind, a dataclass, that a JSON list of `asdict` of them says.

    Losses may be NaN or infinite, and a later version may say more. Raises ValueError, with the key
    and the reason, for any other text.
    """
    return [record_of(kind, words) for words in parse_json(text, list[kind], constants=True)]


def record_of(kind: type[Item], words: Mapping[str, Any]) -> Item:
    """The record that words say which have its shape; what they leave out is as by default."""
    names = (field.name for field in fields(kind))  # type: ignore[arg-type]
    own: Any = {name: words[name] for name in names if name in words}
    return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in own.items()})


def versions() -> dict[str, str]:
    """The versions of Python and the packages whose behaviour the numbers may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
