"""Before the package is imported: its shapes are enforced, and the hub is out of reach."""

import gc
import importlib.util
import logging
import os
import re
import shutil
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers

if importlib.util.find_spec("beartype"):  # not on every machine that lends a GPU
    from tests.support import checked

    checked.install("quip")
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("same every time", deadline=None, derandomize=True, database=None)
    settings.load_profile("same every time")
pytest.register_assert_rewrite("tests.laws")
# A forked process leaves its parent's garbage alone: the end of a TCPStore waits for its thread,
# which is gone there, and whose place another may have taken.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where `&` started this, ignoring it
torch.set_num_threads(1)  # sums in one order, and no fight for cores

IMPORTED = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)
LEFT_OUT: list[str] = []  # files with tests for a GPU, and what they lack on this machine


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With -m gpu, no file is imported that has no such test, nor what only it needs."""
    if config.option.markexpr == "gpu" and collection_path.name.startswith("test_"):
        text = collection_path.read_text()
        if "mark.gpu" not in text:
            return True
        packages = sorted(set(IMPORTED.findall(text)) - {"tests"})
        if missing := [name for name in packages if not importlib.util.find_spec(name)]:
            LEFT_OUT.append(f"left out: {collection_path.name}, which needs {', '.join(missing)}")
            return True
    return None


def pytest_report_collectionfinish() -> list[str]:
    return LEFT_OUT


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def problem():
    """problem(m, n) -> W, H in float64: what a layer and its inputs look like, undamped."""

    def make(
        m: int, n: int, *, rank: int | None = None, dead: tuple[int, ...] = (), seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        W = randn(m, n) * randn(m, 1).exp()  # rows of different sizes
        x = randn(rank or 2 * n + 8, n) @ randn(n, n) * randn(n).exp()  # correlated, ill-scaled
        x[:, list(dead)] = 0
        return W, x.T @ x / len(x)

    return make


@pytest.fixture(autouse=True)
def log():
    """main() gives the log a handler on the stream of that moment, which ends with the test."""
    log = logging.getLogger("quip")
    yield log
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


@pytest.fixture
def command(monkeypatch):
    """main() sets defaults of the environment, which end with the test."""
    for name, value in (("HF_HUB_VERBOSITY", "error"), ("TRANSFORMERS_VERBOSITY", "error")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # read when tqdm is imported, which it is by now
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def quip(command, capsys):
    """quip(words) -> status, output and lines of stderr."""

    from quip import cli  # once its shapes are enforced

    def call(*words: object) -> tuple[int, str, list[str]]:
        status = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return call


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """The checkpoint of a tiny OPT, with its report."""
    from tests.support.checkpoints import save_quantized

    folder = tmp_path_factory.mktemp("checkpoints") / "opt"
    save_quantized(folder)
    return folder


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    """A copy of that checkpoint, to damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))
