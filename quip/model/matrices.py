"""Where a model's blocks and matrices are, and whether a walk over them would miss any."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quip.errors import NonFinite, UnsupportedModel
from quip.model.probe import is_product, is_scale
from quip.packed.checkpoint import check_loadable
from quip.packed.checks import is_finite
from quip.packed.experts import Experts
from quip.packed.linear import quantized_layers


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder: the dotted name of the longest nn.ModuleList, and the list.

    Lists inside the members of another (the experts of a block) do not count. Raises
    UnsupportedModel where the longest is not unique or mixes classes of blocks.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            lists[name] = module
    kind = type(model).__name__
    if not lists:
        raise UnsupportedModel(f"{kind}: no nn.ModuleList of decoder blocks to walk")
    length = max(map(len, lists.values()))
    longest = [name for name, blocks in lists.items() if len(blocks) == length]
    if len(longest) > 1:
        raise UnsupportedModel(
            f"{kind}: {len(longest)} lists of {length} blocks ({', '.join(longest)}); "
            "only a model with a single decoder can be walked"
        )
    classes = {type(block).__name__ for block in lists[longest[0]]}
    if len(classes) > 1:
        raise UnsupportedModel(
            f"{kind}: the blocks of {longest[0]} are of {len(classes)} classes "
            f"({', '.join(sorted(classes))}); only blocks of one class can be walked"
        )
    return longest[0], lists[longest[0]]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a model, which a module multiplies with."""

    name: str  # full and dotted, without `.weight`
    module: nn.Module  # with a weight, and perhaps a bias

    @property
    def weight(self) -> Float[Tensor, "m n"]:
        weight = self.module.get_parameter("weight")
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> Float[Tensor, " m"] | None:
        return getattr(self.module, "bias", None)

    @property
    def rows(self) -> int:
        """The number of outputs."""
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        """The number of inputs."""
        return self.weight.shape[1]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Every matrix of a model by name (without `.weight`), in the order of the model."""

    quantized: tuple[str, ...]  # the nn.Linear and Conv1D modules inside the blocks
    kept: tuple[str, ...]  # embeddings, heads and projections outside the blocks, and routers


def coverage(model: nn.Module) -> Coverage:
    """What a walk over the model quantizes, and what it keeps as it is.

    Raises UnsupportedModel, naming the parameter, for a matrix inside a block that the walk
    would have to skip (experts that are still fused, an embedding) or cannot replace alone (tied).
    """
    prefix, _ = find_blocks(model)
    routers = routers_of(model)
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    quantized, kept, refused = [], [], {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2 or _is_scale(model, name, prefix):
            continue
        if not name.startswith(f"{prefix}.") or name in routers:
            kept.append(name.removesuffix(".weight"))
        elif reason := _obstacle(model, name, holders[id(parameter)]):
            refused[f"{name} {reason}"] = parameter.numel()
        else:
            quantized.append(name.removesuffix(".weight"))
    if refused:
        largest = max(refused, key=refused.__getitem__)
        more = f"; {len(refused) - 1} more parameters are refused" if len(refused) > 1 else ""
        raise UnsupportedModel(
            f"{type(model).__name__}: {largest}, so it would silently stay unquantized{more}; "
            "choose a model whose blocks hold their matrices in nn.Linear modules"
        )
    return Coverage(quantized=tuple(quantized), kept=tuple(kept))


def routers_of(model: nn.Module) -> set[str]:
    """The parameters by which a mixture chooses experts and weighs shared ones, by name.

    A router or such a gate stands beside `Experts`, in the module that holds these, and each matrix
    in it has one row an expert, or one row: numbers of a token by which others are multiplied. A
    shared expert has other matrices too.
    """
    found: set[str] = set()
    for name, experts in model.named_modules():
        if not isinstance(experts, Experts):
            continue
        owner = name.rpartition(".")[0]
        for child, module in model.get_submodule(owner).named_children():
            held = {own: x for own, x in module.named_parameters() if x.ndim > 1}
            if module is not experts and all(
                x.ndim == 2 and len(x) in (1, len(experts)) for x in held.values()
            ):
                found |= {".".join(filter(None, (owner, child, own))) for own in held}
    return found


def matrices_of(block: nn.Module, name: str) -> Iterator[Matrix]:
    """The matrices to quantize of a block of this name, which have not been replaced."""
    routers = routers_of(block)
    for own, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and f"{own}.weight" not in routers:
            yield Matrix(f"{name}.{own}", module)


def covered(model: nn.Module) -> tuple[Matrix, ...]:
    """The matrices that a walk quantizes, in the order of the model. Raises as `coverage` does."""
    names = coverage(model).quantized
    return tuple(Matrix(name, model.get_submodule(name)) for name in names)


def places(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The block and the number of inputs of each matrix that a walk quantizes.

    Raises as `coverage` does.
    """
    start = len(find_blocks(model)[0]) + 1
    return {
        matrix.name: (int(matrix.name[start:].partition(".")[0]), matrix.columns)
        for matrix in covered(model)
    }


def _is_scale(model: nn.Module, name: str, prefix: str) -> bool:
    """Whether this parameter of a block is no matrix: a norm's scale may have two axes."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    inside = name.startswith(f"{prefix}.") and not isinstance(module, nn.Linear | Conv1D)
    return inside and is_scale(module, own)


def _obstacle(model: nn.Module, name: str, holders: list[str]) -> str | None:
    """Why the walk cannot quantize this parameter of a block, or None where it can."""
    owner = model.get_submodule(name.rpartition(".")[0])
    parameter = model.get_parameter(name)
    if not (name.endswith(".weight") and is_product(owner)):
        shape = " x ".join(map(str, parameter.shape))
        return f"({shape}, in a {type(owner).__name__}) is not the weight of an nn.Linear"
    if len(holders) > 1:
        return f"is tied to {next(other for other in holders if other != name)}"
    if parameter.dtype.itemsize < 2:
        return f"is stored in {parameter.dtype}, already quantized"
    return None


def check_quantizable(model: PreTrainedModel, name: str) -> Coverage:
    """The coverage of the model of this name.

    Raises UnsupportedModel where nothing is to do, and where what is done could not be loaded.
    """
    if quantized_layers(model):
        raise UnsupportedModel(
            f"{name} is a checkpoint of quip, quantized already; give the original, or "
            "leave out --wbits to evaluate it"
        )
    covered = coverage(model)
    if not covered.quantized:
        raise UnsupportedModel(
            f"{name}: its blocks hold no nn.Linear to quantize; give another model"
        )
    check_loadable(model)
    return covered


def check_weights(model: nn.Module) -> None:
    """Raise NonFinite, naming the first parameter that holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        check_weight(name, parameter.detach())


def check_weight(name: str, weight: Tensor) -> None:
    """Raise NonFinite where a parameter of this name holds a NaN or an infinity."""
    if not is_finite(weight):
        raise NonFinite(
            f"{name}: NaN or infinity among the weights ({weight.dtype}); the checkpoint "
            "is damaged, or was cast to a dtype of too small a range (try float32)"
        )
