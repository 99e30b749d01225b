"""Which parameter receives each tensor of a .gguf file: one that none receives would be lost."""

import re
from collections.abc import Iterator
from copy import deepcopy

from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf import GGUF_ARCHS, get_gguf_conversion_mapping
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from quip.errors import UnsupportedModel, shown
from quip.model.gguf.header import Header
from quip.packed.checkpoint import skeleton

# Tensors that no parameter needs to receive.
NO_PARAMETER = {
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight": "rotary scaling, now in the config",
    r"blk\.\d+\.attn_rot_embd(\.weight)?": "plain rotary frequencies, which models compute",
}


def check_tensors(config: PretrainedConfig, header: Header) -> None:
    """Raise UnsupportedModel unless some parameter receives every tensor of the file."""
    model = skeleton(config)
    receivers = _by_rules if header.architecture in GGUF_ARCHS else _by_names
    received, harmless = set(receivers(model, header)), "|".join(NO_PARAMETER)
    left = [x for x in header.tensors if x not in received and not re.fullmatch(harmless, x)]
    if left:
        raise UnsupportedModel(
            f"no parameter of a {config.model_type} receives {len(left)} of its tensors, such as "
            f"{shown(min(left))}"
        )


def _by_rules(model: PreTrainedModel, header: Header) -> Iterator[str]:
    """The tensors that transformers' newer reader, a list of renamings, puts into the model."""
    steps = deepcopy(get_gguf_conversion_mapping(header.architecture, model.config))
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    names = model.state_dict().keys()
    for tensor in header.tensors:
        name, _ = rename_source_key(tensor, renamings, converters)
        # Multi-token prediction guesses ahead; the next token is what it is without.
        if name in names or name.startswith("mtp."):
            yield tensor


def _by_names(model: PreTrainedModel, header: Header) -> Iterator[str]:
    """The tensors that transformers' older reader, a table of names, puts into the model."""
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)()
    try:
        places = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:  # a Llama, say, that is called mistral
        raise UnsupportedModel(
            f"transformers takes it for a {model.config.model_type}, whose tensors it cannot place"
        ) from error
    for tensor in header.tensors:
        # Experts are placed without their suffix, and the output of GPT-2 by hand.
        by_hand = header.architecture == "gpt2" and tensor == "output.weight"
        if tensor in places or tensor.removesuffix(".weight") in places or by_hand:
            yield tensor
