"""What vLLM asks of a way to quantize: which of its layers are packed, and as what."""

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from quip.errors import Unavailable, UnsupportedModel
from quip.packed.files import DAMAGED
from quip.packed.hub import EXPERT, METHOD, QuipConfig
from quip.packed.layout import Layout
from quip.serve.vllm.linear import QuipLinear
from quip.serve.vllm.products import REMEDY, members, products


class QuipQuantization(QuantizationConfig):
    """The `quantization_config` of a checkpoint of quip, by vLLM's names of its modules."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout, self.met = layout, set[str]()  # the names of matrices that have a layer

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuipQuantization":
        """Raises QuipError for words that this version does not know, or that vLLM cannot run."""
        layout = QuipConfig(**config).layout
        if not layout.names:
            raise Unavailable(f"its config.json names no quantized matrix; {DAMAGED}")
        for name in layout.names:
            if EXPERT.fullmatch(name):
                raise _no_experts(name)
            if "." not in name:
                raise UnsupportedModel(f"{name} is packed, and vLLM reads heads dense; {REMEDY}")
        return cls(layout)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        def name(old: str) -> str:
            return hf_to_vllm_mapper.map_name(old) or old

        self.layout = Layout(
            {name(old): spec for old, spec in self.layout.modules.items()},
            {tuple(map(name, old)): spec for old, spec in self.layout.stacks.items()},
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer computes; None for embeddings and all that is no matrix."""
        if isinstance(layer, RoutedExperts):
            raise _no_experts(prefix)
        if isinstance(layer, VocabParallelEmbedding) and prefix in self.layout.names:
            raise UnsupportedModel(f"{prefix} is packed, and vLLM reads heads dense; {REMEDY}")
        if not isinstance(layer, LinearBase):
            return None
        self.met |= {prefix, *members(prefix, self.packed_modules_mapping)}
        found = products(self.layout, prefix, self.packed_modules_mapping)
        if not found:
            return UnquantizedLinearMethod()
        return QuipLinear(prefix, found, self.check_all_met)

    def check_all_met(self) -> None:
        """Raise UnsupportedModel for a matrix that no layer asked for, once all are made.

        Under another name its layer would be dense, and vLLM may leave that at random.
        """
        left = {*self.layout.names} - self.met
        if left and get_pp_group().world_size == 1:  # else other processes have them
            raise UnsupportedModel(
                f"{min(left)}: no layer of vLLM goes by this name, in which it is packed; {REMEDY}"
            )

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # where no kernel serves, torch does

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json is enough


def _no_experts(name: str) -> UnsupportedModel:
    return UnsupportedModel(f"{name}: the plugin knows no mixtures of experts; {REMEDY}")
