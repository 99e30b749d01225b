"""Packed checkpoints: folders that from_pretrained loads after `import quip`.

model.safetensors holds the packed matrices under the names of their buffers, and everything else
in the narrowest type that holds it exactly: an embedding that came as float16 goes as float16,
whatever the run computed in. config.json says what to compute in and what the tensors mean.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quip.errors import QuipError, Unavailable, UnsupportedModel, UsageError, one_line, shown
from quip.files import complete, keep_aside, new_folder
from quip.packed.checks import check_counts, check_finite
from quip.packed.digests import unverified
from quip.packed.exchange import dense, name_by_kind
from quip.packed.files import DAMAGED, INDEX, weight_files
from quip.packed.gaps import lacking, refuse_gaps
from quip.packed.hub import METHOD, QuipConfig, check_files
from quip.packed.linear import quantized_layers
from quip.packed.shards import write_weights
from quip.reading import read_json


class Config(TypedDict):
    """What has to be known of a config.json to tell whose it is."""

    quantization_config: NotRequired[dict[str, Any] | None]


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    parts: Sequence[Path] = (),
    texts: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model with quantized matrices, its tokenizer, and more files with these texts.

    Of a model whose blocks are on the meta device, `parts` are files of these (`write_weights`).
    The folder appears when it is complete; one that exists is replaced whole, or left alone.
    Raises Unavailable where it cannot be written, and NonFinite for NaN or infinity in a tensor.
    """
    if not quantized_layers(model):
        raise QuipError("the model holds no quantized matrix: there is nothing to pack")
    check_finite(model, "nothing is saved, for nobody could load it; quantize the model anew")
    model.config.quantization_config = QuipConfig.of(model)
    with new_folder(folder, overwrite=overwrite) as partial:
        write_weights(model, partial, parts)
        tokenizer.save_pretrained(partial)
        for name, text in (texts or {}).items():
            (partial / name).write_text(text)
        try:
            check_saved(partial)
        except QuipError as error:
            complete(partial)
            kept = keep_aside(partial, folder.resolve())
            raise type(error)(
                f"{folder}: what was saved could not be loaded ({error}); it is in {kept}, and its "
                "kind of model is to be reported"
            ) from error


def check_saved(folder: Path) -> None:
    """Raise Unavailable unless loading will find in a folder all that it looks for.

    The model is made from config.json as loading makes it, on the meta device, and compared with
    the headers of the files: no weight is read.
    """
    model = skeleton(folder)
    QuipConfig(**model.config.quantization_config).layout.make_room(model)
    held = check_files(model, [str(path) for path in weight_files(folder)])
    if missing := lacking(model, held):
        raise Unavailable(
            f"{min(missing)}: config.json asks for it, and the files hold nothing; {DAMAGED}"
        )


def check_loadable(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel where the config of a model makes another: nobody could load it."""
    kind, config = type(model).__name__, copy.deepcopy(model.config)
    try:
        made = type(skeleton(config)).__name__
    except Unavailable:
        made = "no model"
    if made != kind:
        raise UnsupportedModel(
            f"a {kind} cannot be loaded once it is saved: transformers makes {made} of a "
            f"{type(config).__name__}; give another model"
        )


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    verify: bool = True,
) -> PreTrainedModel:
    """The model of a checkpoint, in evaluation mode, every tensor of it read from the files.

    `dtype` is what it computes in: "auto" is that of the run which saved it. Raises Unavailable
    for a folder that is no complete checkpoint, or, unless `verify` is false, where the digest of a
    tensor is not what it was, and UnsupportedModel for one that quip did not write.
    """
    check_folder(folder)
    options = {} if device_map is None else {"device_map": device_map}
    with nullcontext() if verify else unverified():
        return read_model(
            str(folder),
            folder,
            lambda error: f"the model cannot be read ({one_line(error)}); {DAMAGED}",
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )


def read_model(
    name: str, where: str | Path, damage: Callable[[Exception], str], **options: Any
) -> PreTrainedModel:
    """What from_pretrained gives, in evaluation mode, every tensor of it read from the files.

    Raises QuipError, which starts with the name of the model; `damage` says, after it, what an
    error of the loaders underneath means, who raise no common class.
    """
    try:
        if os.path.isfile(os.path.join(where, INDEX)):
            weight_files(Path(where))  # or transformers would follow whatever path it names
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, output_loading_info=True, **options
        )
    except QuipError as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:
        raise Unavailable(f"{name}: {damage(error)}") from error
    model, info = loaded
    refuse_gaps(name, info, model.state_dict().keys())
    return model.eval().requires_grad_(False)


def skeleton(of: PretrainedConfig | Path) -> PreTrainedModel:
    """The model of a config, or of a folder's config.json, without content (on the meta device)."""
    try:
        config: Any = of
        if isinstance(of, Path):
            config = AutoConfig.from_pretrained(of, local_files_only=True, trust_remote_code=False)
        check_counts(config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=config.dtype, trust_remote_code=False
            )
    except QuipError:
        raise
    except Exception as error:  # the loaders underneath raise no common class
        raise Unavailable(
            f"its config.json makes no model ({one_line(error)}); {DAMAGED}"
        ) from error


def read_tokenizer(where: str, **options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer that knows words. Raises whatever the loaders do, and ValueError for another."""
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    # Where no files are found, transformers may return a tokenizer with an empty vocabulary.
    if not tokenizer("The quick brown fox", add_special_tokens=False)["input_ids"]:
        raise ValueError("its vocabulary is empty")
    return tokenizer


def positions(config: PretrainedConfig) -> int | None:
    """How many tokens a model can take at once; None where it is not limited, as with ALiBi."""
    text = config.get_text_config()
    named = (getattr(text, key, None) for key in ("max_position_embeddings", "max_seq_len"))
    return next(filter(None, named), None)


def check_folder(folder: str | Path) -> None:
    """Raise unless the folder says that it is a checkpoint of quip."""
    path = Path(folder) / "config.json"
    if not os.path.isfile(path):  # unlike Path.is_file, for any name
        raise Unavailable(
            f"{folder}: not a checkpoint, it has no config.json that can be read; name a folder "
            "written by --save"
        )
    try:
        config = read_json(path, Config, remedy=DAMAGED, called="its config.json")
        words = config.get("quantization_config") or {}
        if (method := words.get("quant_method")) != METHOD:
            what = f"was quantized by {shown(method)}" if method else "is not quantized"
            raise UnsupportedModel(f"the model {what}; name a folder written by --save")
        QuipConfig(**words)
    except QuipError as error:
        raise type(error)(f"{folder}: {error}") from error


def check_replaced(folder: Path) -> None:
    """Raise UsageError for a --save folder that holds files and is no checkpoint."""
    if folder.is_dir() and any(folder.iterdir()):
        try:
            check_folder(folder)
        except QuipError as error:
            raise UsageError(
                f"--save {folder}: --overwrite replaces checkpoints of quip only, and this folder "
                "is none; name another"
            ) from error


def to_dense(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model as transformers has it, with dense matrices for packed ones, without a trace."""
    dense(model, dtype or model.dtype)
    return unmarked(model)


def unmarked(model: PreTrainedModel) -> PreTrainedModel:
    """The model without what says that quip packed it, to be saved under the names of its kind."""
    name_by_kind(model)
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[assignment]
    return model
