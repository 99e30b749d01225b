"""Models of vLLM without an engine, read as its workers do, and what quip says of their layers."""

from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype

from quip.serve.vllm.linear import QuipLinear


def join(meeting: Path, rank: int = 0, count: int = 1) -> None:
    """Make this one of so many processes, with the plugins that vLLM finds."""
    load_general_plugins()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(count, rank, f"file://{meeting}", rank, "gloo")
        ensure_model_parallel_initialized(count, 1, backend="gloo")


def read(folder: Path, dtype: str = "float32") -> nn.Module:
    """The model of a folder."""
    config = EngineArgs(model=str(folder), dtype=dtype, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(config):
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(vllm_config=config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    layers = model.named_modules()
    return {
        name: layer
        for name, layer in layers
        if isinstance(getattr(layer, "quant_method", None), QuipLinear)
    }


def expected(ours: nn.Module, name: str, merged: dict[str, list[str]], x: Tensor) -> list[Tensor]:
    """What the matrices of a layer of vLLM answer in quip's model, one by one."""
    parent, _, last = name.rpartition(".")
    inside = ours.get_submodule(parent)
    names = [last] if hasattr(inside, last) else merged[last]
    return [getattr(inside, each)(x) for each in names]
