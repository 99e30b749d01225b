"""What transformers parses of a .gguf file again and again, parsed once.

Config, tokenizer and weights each read all keys of a file, and every module of a model asks for the
table of all names of tensors: of SmolLM2-135M that is nine tenths of the time that loading takes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any

TURN = RLock()  # what one thread puts back another must not take for the package's own
NAMES = ("GGUFReader", "get_tensor_name_map")  # of the package gguf, whose answers are read only


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, the package gguf remembers what it was asked. One thread at a time."""
    import gguf

    with TURN:
        known: dict[str, Callable[..., Any]] = {name: getattr(gguf, name) for name in NAMES}
        try:
            for name, function in known.items():
                setattr(gguf, name, cache(function))
            yield
        finally:
            for name, function in known.items():
                setattr(gguf, name, function)
