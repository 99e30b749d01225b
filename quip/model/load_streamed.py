"""Which models are streamed, and how one is opened: its skeleton in memory, its blocks in files."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from quip.errors import QuipError, Unavailable, UnsupportedModel, UsageError
from quip.model.device import free_host_bytes
from quip.model.matrices import find_blocks
from quip.model.stream import Stream
from quip.packed.checkpoint import skeleton
from quip.packed.files import INDEX, SINGLE, header, weight_files
from quip.packed.gaps import refuse_gaps

MODES = ("auto", "on", "off")
SHARE = 4  # of the free memory, which a model that is not streamed may take one part of so many


def folder_to_stream(
    name: str, where: str, config: PretrainedConfig, dtype: torch.dtype, mode: str
) -> Path | None:
    """The folder whose files are to be streamed; None: the model is to be loaded whole.

    Auto streams models that take more than a quarter of the free memory in this dtype. Raises
    UsageError for a mode that is none, and where it is on and there are no safetensors files.
    """
    if mode not in MODES:
        raise UsageError(f"--stream {mode}: choose from {', '.join(MODES)}")
    if mode == "off":
        return None
    folder = None if where.endswith(".gguf") else _snapshot(where)
    if folder is None and mode == "on":
        raise UsageError(
            f"--stream on: {name} has no safetensors files, and no others can be read block by "
            "block; leave it out, or save the model with save_pretrained first"
        )
    if folder is None or mode == "on":
        return folder
    large = SHARE * _bytes(folder, config, dtype) > free_host_bytes()
    return folder if large and _has_blocks(config) else None


def load_streamed(
    name: str,
    where: str,
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    damage: Callable[[Exception], str],
) -> tuple[PreTrainedModel, Stream]:
    """The model in evaluation mode without its blocks, and where these are.

    Raises as `read_model` does, and UnsupportedModel for a model without one list of blocks.
    """
    try:
        stream = Stream(name, folder, deepcopy(config))
        model, info = stream.load(config, dtype)
    except QuipError as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:  # the loaders underneath raise no common class
        raise Unavailable(f"{name}: {damage(error)}") from error
    refuse_gaps(name, info, model.state_dict().keys())
    model.config.name_or_path = model.name_or_path = where
    _take_generation(model, folder)
    return model, stream


def _snapshot(where: str) -> Path | None:
    """The folder that holds a model's safetensors files, fetched from the hub if need be."""
    if Path(where).is_dir():
        return next((Path(where) for file in (SINGLE, INDEX) if Path(where, file).is_file()), None)
    for file in (SINGLE, INDEX):
        path = cached_file(where, file, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            if file == INDEX:
                get_checkpoint_shard_files(where, path)
            return Path(path).parent
    return None


def _bytes(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What the tensors of a folder take in memory; packed ones stay as they are."""
    entries = [entry for path in weight_files(folder) for entry in header(path).values()]
    if getattr(config, "quantization_config", None):
        return sum(entry.nbytes for entry in entries)
    return sum(math.prod(entry.shape) * dtype.itemsize for entry in entries)


def _has_blocks(config: PretrainedConfig) -> bool:
    """Whether the model of a config is one list of blocks."""
    try:
        find_blocks(skeleton(deepcopy(config)))
    except UnsupportedModel:
        return False
    return True


def _take_generation(model: Any, folder: Path) -> None:
    """What from_pretrained reads beside the weights: how the model is to generate."""
    if model.can_generate():
        places = dict.fromkeys(("cache_dir", "proxies", "token"))
        model.adjust_generation_fn(
            None,
            True,
            None,
            str(folder),
            **places,
            force_download=False,
            local_files_only=True,
            revision="main",
            subfolder="",
            trust_remote_code=False,
        )
