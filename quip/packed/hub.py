"""What from_pretrained and save_pretrained need to know of packed matrices.

config.json says what the tensors mean (`QuipConfig`); the quantizer puts an empty QuantizedLinear
wherever it says so, before the files are read. `import quip` brings this module in as soon as
transformers has its quantizers, and not before: importing them takes seconds.
"""

import re
from collections.abc import Collection, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quip.errors import QuipError, Unavailable, shown
from quip.packed.checks import check_counts, check_finite, check_left_over
from quip.packed.digests import check_digests, streamed, verifying
from quip.packed.exchange import dense
from quip.packed.experts import Experts, lay_out, unfuse
from quip.packed.files import DAMAGED, TensorEntry, header
from quip.packed.gaps import lacking
from quip.packed.layout import FORMATS, Layout, own_name
from quip.packed.linear import quantized_layers

METHOD = "quip"
WIDE = (torch.float32, torch.float64)
EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(gate_up_proj|up_proj|down_proj)")  # a matrix of one
FILE_DTYPES = {
    torch.int8: "I8",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


class QuipConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json: the format, what the tensors mean, and of whom."""

    def __init__(self, /, **words: Any) -> None:
        """Raises QuipError for a format or a kind of matrix that this version cannot read."""
        form = words.get("format")
        if type(form) is not int or form not in FORMATS:
            newer = type(form) is int and form > max(FORMATS)
            remedy = "upgrade quip" if newer else "its config.json is damaged; " + DAMAGED
            raise QuipError(
                f"a checkpoint of format {shown(form)}, and this version of quip reads formats "
                f"{', '.join(map(str, FORMATS))}: {remedy}"
            )
        self.layout = Layout.from_json(words)
        self.quant_method: Any = METHOD

    @classmethod
    def of(cls, model: nn.Module) -> "QuipConfig":
        """The config of a model that holds quantized matrices."""
        layout = Layout.of(model)
        return cls(format=layout.format, **layout.to_json())

    def to_dict(self) -> dict[str, Any]:
        words = self.layout.to_json()
        return {"quant_method": METHOD, "format": self.layout.format, **words}


class QuipQuantizer(HfQuantizer):
    """Makes room for packed matrices before a checkpoint is read, and checks them after."""

    requires_calibration = True  # from_pretrained cannot quantize a model on the way
    quantization_config: QuipConfig
    _renames = True  # whether files have other names than the modules, which transformers maps

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        check_counts(config)  # this is called before the model is made, and nothing else is
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        saved = self.quantization_config.layout
        if not saved.names:
            raise Unavailable(f"its config.json names no quantized matrix; {DAMAGED}")
        unfuse(model)  # so that it has the names of the files
        layout = saved.within(model)
        layout.make_room(model)
        files = kwargs.get("checkpoint_files") or streamed.get()
        held = check_files(model, files, beside=set(saved.names) - set(layout.names))
        if verifying.get():
            check_digests([Path(file) for file in files])
        self._renames = bool(lacking(model, held))
        for name in layout.names:
            _hold_weight(model.get_submodule(name))
        ignored: Any = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        ignored |= {f"^{re.escape(guard(names))}$" for names in (saved, layout)}
        model._keys_to_ignore_on_load_unexpected = ignored
        self.quantization_config = copy(self.quantization_config)  # the caller may hold this one
        self.quantization_config.layout = layout

    # Earlier versions of transformers ask without the model.
    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """None where the files go by the names of the modules, as ours do; older ones may not."""
        return weight_conversions if self._renames else []

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self.quantization_config.layout.names:
            del model.get_submodule(name).weight
        for name, layer in quantized_layers(model).items():
            if any(tensor.is_meta for tensor in layer.stored().values()):
                continue  # offloaded to disk
            try:
                layer.check()
            except QuipError as error:
                raise Unavailable(f"{name}: {error}; {DAMAGED}") from error
        check_finite(model)
        for module in model.modules():
            if isinstance(module, Experts):
                lay_out(module)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> nn.Module:
        # Once a model was saved, its config holds its dtype as a word, and that is passed here.
        named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return dense(model, named or model.dtype)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """What save_pretrained writes of a model that was loaded, whatever it was handed."""
        return narrowed(model), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether generate() may compile a step: a packed product is one operator (ops.py)."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on packed matrices can be trained; codes cannot (`is_qat_trainable`)."""
        return True


def _hold_weight(module: Any) -> None:
    """Give a packed matrix the shape of a weight while the rest of the model is initialized.

    Classes such as GPTBigCodeMLP draw the weights of their parts, which they take to be nn.Linear;
    a weight that counts as initialized is left alone.
    """
    weight: Any = torch.empty(module.out_features, module.in_features, device="meta")
    weight._is_hf_initialized = True
    module.weight = weight


def check_files(
    model: nn.Module, files: Sequence[str], *, beside: Collection[str] = ()
) -> set[str]:
    """Compare the headers of safetensors files with what the model needs; the names in them.

    transformers itself only warns of what is missing, and fills it at random. Packed matrices must
    be there; other tensors may go by older names in a file, but under their own have their shape.
    Tensors of the matrices `beside` belong to no part of this model.
    """
    found: dict[str, TensorEntry] = {}
    for file in files:
        if file.endswith(".safetensors"):
            found |= header(Path(file))
    unread = guard(Layout.of(model))
    here = {*model.state_dict(), unread}
    found = {own_name(model, name, here): entry for name, entry in found.items()}
    if unread in found and 0 in found[unread].shape:
        del found[unread]
    if files and not found:
        raise Unavailable(f"no safetensors among its files, and nothing else is read; {DAMAGED}")
    for name, layer in quantized_layers(model).items():
        for key, tensor in layer.stored().items():
            wanted = f"{FILE_DTYPES[tensor.dtype]} {list(tensor.shape)}"
            held = found.get(f"{name}.{key}")
            there = f"{held.dtype} {list(held.shape)}" if held else "nothing"
            if there != wanted:
                raise Unavailable(
                    f"{name}.{key}: config.json asks for {wanted}, and the files hold {there}; "
                    + DAMAGED
                )
    check_left_over(model, {name for name in found if name.rpartition(".")[0] not in beside})
    for name, tensor in model.state_dict().items():
        if name in found and found[name].shape != tuple(tensor.shape):
            raise Unavailable(
                f"{name}: config.json asks for the shape {list(tensor.shape)}, and the files hold "
                f"{list(found[name].shape)}; {DAMAGED}"
            )
    return set(found)


def narrowed(model: nn.Module) -> dict[str, Tensor]:
    """The `narrow_state` of a model, and its guard where it holds packed matrices."""
    state, layout = narrow_state(model), Layout.of(model)
    return state | ({guard(layout): torch.empty(0, dtype=torch.float16)} if layout.names else {})


def narrow_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a model or a block, each tensor in the narrowest type that holds it exactly.

    Those of packed matrices stay as they are: config.json says of which type they are. What is on
    the meta device is left out.
    """
    layers = quantized_layers(module)
    packed = {f"{name}.{key}" for name, layer in layers.items() for key in layer.stored()}
    made: dict[tuple[int, torch.Size], Tensor] = {}  # tied tensors stay one

    def narrow(x: Tensor) -> Tensor:
        key = x.data_ptr(), x.shape
        if key not in made:
            made[key] = next(
                (y for y in map(x.to, (torch.float16, torch.bfloat16)) if torch.equal(y.to(x), x)),
                x,
            )
        return made[key]

    return {  # row after row: matrices of experts may be held transposed
        name: x if name in packed else (narrow(x) if x.dtype in WIDE else x).contiguous()
        for name, x in module.state_dict().items()
        if not x.is_meta
    }


def guard(layout: Layout) -> str:
    """The name of a tensor without numbers: the dense weight of one of the packed matrices.

    transformers fills what is missing at random, and only warns of it. A weight of another shape
    is an error to it: so without quip it refuses a checkpoint that holds this one. It knows none of
    a single expert; where nothing else is packed, the name is that of all experts of a layer.
    """

    def rank(name: str) -> tuple[bool, bool, str]:
        return "." not in name, bool(EXPERT.fullmatch(name)), name  # a head last

    first = min(layout.names, key=rank, default="")
    expert = EXPERT.fullmatch(first)
    return f"{expert[1]}.{expert[2]}" if expert else f"{first}.weight"


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # the module may be loaded again
    register_quantization_config(METHOD)(QuipConfig)
    register_quantizer(METHOD)(QuipQuantizer)
