"""A quantized Llama of two blocks, in memory and in a folder."""

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.support.checkpoints import quantized, save


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return quantized("llama", blocks=2)


@pytest.fixture(scope="session")
def saved(model, tmp_path_factory) -> Path:
    """A folder with that Llama."""
    return save(model, tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy of that folder, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))
