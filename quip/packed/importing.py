"""A folder of matrices that another program packed as a checkpoint of ours, every weight as it was.

What layouts have in common: headers are compared with what config.json promises before a weight is
read. A layout says what it finds, as `Packed` matrices, each of which makes our tensors of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from quip.errors import QuipError, Unavailable, UnsupportedModel
from quip.packed.checkpoint import save_checkpoint, skeleton
from quip.packed.files import DAMAGED, TensorEntry, weight_bytes
from quip.packed.layout import Layout
from quip.packed.linear import quantized_layers
from quip.packed.published import (
    FLOAT,
    Slot,
    check_held,
    check_out,
    foreign,
    generation_of,
    headers,
    model_config,
    tokenizer_of,
)
from quip.packed.spec import Spec

HEAD = "lm_head."
MATCHED = "name the folder of a model whose matrices transformers has one by one"
Held: TypeAlias = Mapping[str, TensorEntry]


@runtime_checkable
class Packed(Protocol):
    """A packed matrix of the files, of m outputs and n inputs."""

    @property
    def name(self) -> str: ...
    @property
    def m(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def bits(self) -> int: ...

    @property
    def slots(self) -> dict[str, Slot]:
        """Its tensors in the files, by their whole names."""
        ...

    def read(self, held: Held) -> tuple[Spec, dict[str, Tensor]]:
        """What it is here, and its tensors by the names of our checkpoints, but for its bias."""
        ...


Find: TypeAlias = Callable[[PreTrainedModel, dict[str, TensorEntry]], Sequence[Packed]]


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was taken in."""

    matrices: int
    bits: float  # per weight of the matrices, codes alone
    file_bytes: int  # of the checkpoint's weights
    found: Sequence[Packed]


def import_packed(
    folder: str | Path,
    out: str | Path,
    prepare: Callable[[Path], Find],
    *,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> Imported:
    """Write the model of `folder` to `out` as our checkpoint.

    `prepare` reads what the folder says of itself, and returns what finds the packed matrices among
    the tensors of its files; it may take away those that say nothing. The tokenizer is that of the
    folder, or `tokenizer`, a hub id or another folder. The checkpoint computes in the type that
    config.json names.

    Raises UsageError for an `out` that cannot be, UnsupportedModel for a model or a variant of the
    layout that cannot be read, and Unavailable for files that are missing, damaged or do not fit.
    """
    folder, out = Path(folder), Path(out)
    check_out(folder, out, overwrite=overwrite)
    try:
        find, config, held = prepare(folder), model_config(folder), headers(folder)
        vars(config).pop("quantization_config", None)  # of ours there is none yet
        model = _skeleton(config, tied=not any(name.startswith(HEAD) for name in held))
        found = find(model, held)
        check_held(held, _wanted(model, found))
        words = tokenizer_of(str(folder) if tokenizer is None else tokenizer)
        texts = generation_of(folder)
        _fill(model, found, held)
    except QuipError as error:
        raise type(error)(f"{folder}: {error}") from error
    save_checkpoint(model, words, out, texts=texts, overwrite=overwrite)
    weights = sum(x.m * x.n for x in found)
    return Imported(
        matrices=len(found),
        bits=sum(x.bits * x.m * x.n for x in found) / weights,
        file_bytes=weight_bytes(out),
        found=found,
    )


def names_of(held: Held, ending: str) -> list[str]:
    """The packed matrices of the files, each of which has a tensor whose name ends so."""
    names = sorted(key.removesuffix(ending) for key in held if key.endswith(ending))
    if not names:
        raise Unavailable(f"its files hold no packed matrix ({ending[1:]}); {DAMAGED}")
    return names


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The nn.Linear that a packed matrix is. Raises UnsupportedModel where the model has none."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        what = "there is no such module" if module is None else f"it is a {type(module).__name__}"
        raise UnsupportedModel(
            f"{foreign(name)} is a matrix of its files, and in a {type(model).__name__} of "
            f"transformers {what}; {MATCHED}"
        )
    return module


def fitting(name: str, schemes: Mapping[Any, tuple[Mapping[str, Slot], int]], held: Held) -> Any:
    """The scheme of a matrix: the one whose slots have the shapes of the tensors in the files.

    With its slots, each scheme has the number of inputs that share a scale. Where none fits it is
    the first one, with which the files are then compared. A file may also say by patterns of names
    which is whose, and whoever made it how long such a pattern takes: shapes say it at once.

    Raises UnsupportedModel for shapes that are those of several.
    """
    fit: dict[int, Any] = {}
    for scheme, (slots, width) in schemes.items():
        pairs = [(held.get(f"{name}.{key}"), slot) for key, slot in slots.items()]
        if all(entry is None or entry.shape == slot.shape for entry, slot in pairs):
            fit.setdefault(width, scheme)
    if len(fit) > 1:
        raise UnsupportedModel(
            f"{name}: its tensors may be in groups of {' or of '.join(map(str, fit))} inputs, as "
            "config.json has both; name another folder"
        )
    return next(iter(fit.values())) if fit else next(iter(schemes))


def _skeleton(config: PretrainedConfig, *, tied: bool) -> PreTrainedModel:
    """The model as transformers makes it, on the meta device."""
    # What the files have is used: an lm_head of its own is one, whatever config.json says.
    for part in () if tied else (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return skeleton(config).eval().requires_grad_(False)


def _wanted(model: PreTrainedModel, found: Sequence[Packed]) -> dict[str, Slot]:
    """Every tensor that the files have to hold."""
    wanted = {key: slot for matrix in found for key, slot in matrix.slots.items()}
    names = {f"{matrix.name}." for matrix in found}
    for key, x in model.state_dict().items():
        packed = key[: key.rfind(".") + 1] in names
        if not packed and key not in model.all_tied_weights_keys:
            wanted[key] = Slot(tuple(x.shape), FLOAT)
    return wanted


def _fill(model: PreTrainedModel, found: Sequence[Packed], held: Held) -> None:
    """Make room for the packed matrices, and give the model the tensors of the files."""
    specs: dict[str, Spec] = {}
    state: dict[str, Tensor] = {}
    for matrix in found:
        specs[matrix.name], tensors = matrix.read(held)
        state |= {f"{matrix.name}.{key}": x for key, x in tensors.items()}
    Layout(specs).make_room(model)
    wanted = model.state_dict().keys() - state.keys()
    state |= {key: held[key].read() for key in wanted if key in held}
    state |= {key: state[source] for key, source in model.all_tied_weights_keys.items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    for name, layer in quantized_layers(model).items():
        try:
            layer.check()
        except QuipError as error:
            raise Unavailable(f"{name}: {error}; {DAMAGED}") from error
