"""Under `make sanitize` the kernels are those that check themselves, and none is left to torch."""

import os
from pathlib import Path

import pytest

from quip.kernels import native

SOURCES = sorted(Path(native.__file__).parent.rglob("*.cpp"))


@pytest.mark.skipif(
    "-fsanitize=" not in os.environ.get("QUIP_CXXFLAGS", ""), reason="`make sanitize` runs it"
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_a_sanitized_kernel_calls_the_sanitizers(source):
    library = native.library(source)
    assert library is not None
    for function in ("__asan_init", "__ubsan_handle_add_overflow_abort"):
        assert hasattr(library, function)
