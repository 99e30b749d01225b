"""kernels/threads: C++ works in the pool of torch, and any number of threads gives equal bits."""

import ctypes
import threading
from collections.abc import Iterator

import pytest
import torch

from quip.codebooks import e8p
from quip.kernels import centroid_matvec, lattice_matvec, threads
from quip.kernels.bits import pack
from quip.kernels.lattice_points.tables import code_bits

CPU = torch.device("cpu")
needs_pool = pytest.mark.skipif(threads.threads()[0] is None, reason="torch has no OpenMP here")


@pytest.fixture
def several() -> Iterator[int]:
    given = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(given)


def test_torch_has_a_pool_where_it_says_so():
    parallel, count = threads.threads()
    assert count == torch.get_num_threads()
    if threads.MAPS.exists() and "OpenMP 2" in torch.__config__.parallel_info():
        assert parallel is not None


@needs_pool
def test_each_thread_of_the_pool_is_entered_once(several):
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    enter = ctypes.CFUNCTYPE(None, work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    seen, together = [], threading.Barrier(several, timeout=30)

    def take(_: int | None) -> None:
        seen.append(threading.get_ident())
        together.wait()  # so that none is done before another has begun

    enter(threads.threads()[0])(work(take), None, several, 0)
    assert len(seen) == len(set(seen)) == several


@pytest.mark.parametrize("kind", ["none", "hidden", "strange"])
def test_without_a_pool_the_caller_works_alone(kind, monkeypatch, tmp_path):
    maps = tmp_path / kind
    if kind == "hidden":
        maps.mkdir()  # which nobody can read as a file
    if kind == "strange":
        maps.write_bytes(b"7f00-7f01 r-xp 0 00:00 1 /no/\xff/libgomp.so.1 (deleted)\n")
    monkeypatch.setattr(threads, "MAPS", maps)
    threads._entry.cache_clear()
    try:
        assert threads.threads() == (None, torch.get_num_threads())
    finally:
        threads._entry.cache_clear()


@pytest.mark.parametrize("room", [lattice_matvec, centroid_matvec])
def test_products_are_the_same_bits_in_several_threads(room, rng, several):
    m, n, x = 500, 512, torch.randn(2, 512, generator=rng)
    if room is lattice_matvec:
        stages = (e8p.tables(CPU),)
        codes = torch.randint(2 ** code_bits(stages), (m, n // 8), generator=rng)
        args = x, pack(codes, code_bits(stages)), stages, torch.ones(1)
        options = {"group": None, "ratio": None, "dtype": torch.float32}
    else:
        codes = torch.randint(16, (m, n // 2), generator=rng)
        args = x, pack(codes, 4), torch.randn(2, 3, 16, 2, generator=rng), None
        options = {"columns": 256, "block": None, "bits": 4, "dtype": torch.float32}
    shared = room.multiply(*args, **options)
    torch.set_num_threads(1)
    assert torch.equal(room.multiply(*args, **options), shared)
