"""Embedding and head packed: rows of plain grids, each weight to its nearest level."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quip.errors import UnsupportedModel
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for
from quip.packed.embedding import QuantizedEmbedding, TiedHead
from quip.packed.exchange import replace
from quip.packed.linear import QuantizedLinear
from quip.packed.matrix import QuantizedMatrix
from quip.packed.spec import Spec

GROUP = 64  # columns of a row that share a range


@dataclass(frozen=True, kw_only=True)
class TableRecord:
    """What became of an embedding or a head."""

    name: str
    rows: int
    columns: int
    bits_per_weight: float
    error: float  # |W_hat - W|^2 / |W|^2
    tied: str | None  # the head whose weights these are as well


def check_tables(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel where embedding and head are more than a lookup and a product."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    kinds: tuple[tuple[str, Any, type], ...] = (
        ("embedding", embedding, nn.Embedding),
        ("head", head, nn.Linear),
    )
    for what, module, kind in kinds:
        if type(module) is not kind:
            raise UnsupportedModel(
                f"--head_bits: the {what} of a {type(model).__name__} is a "
                f"{type(module).__name__} and no plain {kind.__name__}; leave out head_bits"
            )


@torch.no_grad()
def pack_tables(
    model: PreTrainedModel, bits: int, *, device: torch.device | str
) -> list[TableRecord]:
    """Quantize embedding and head in place, as one where they are tied.

    Raises UnsupportedModel as `check_tables`.
    """
    check_tables(model)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    is_tied, W = head.weight is embedding.weight, embedding.weight
    quantized = _quantized(W, bits, device)
    table = QuantizedEmbedding(
        W.shape[1], len(W), spec=Spec.of(quantized), device="meta", dtype=W.dtype
    )
    table.fill(quantized.tensors(), W.device)
    table.like = nn.Parameter(W.new_empty(0), requires_grad=False)
    replace(model, names[id(embedding)], table.eval())
    name = names[id(head)]
    records = [_record(names[id(embedding)], W, quantized, name if is_tied else None)]
    if is_tied:
        tied = TiedHead(table, head.bias is not None, device="meta")
        tied.bias = head.bias
        replace(model, name, tied.eval())
        _untie(model, name)
    else:
        quantized = _quantized(head.weight, bits, device)
        layer = QuantizedLinear.from_matrix(quantized, head.bias).to(W.device)
        replace(model, name, layer.eval())
        records.append(_record(name, head.weight, quantized, None))
    return records


def table_weights(model: PreTrainedModel) -> int:
    """Weights of embedding and head, those of tied ones counted once."""
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return sum(weight.numel() for weight in {id(one.weight): one.weight for one in tables}.values())


def table_bits(bits: int, columns: int) -> float:
    """Bits per weight that are stored of an embedding or a head: codes, steps and zeros."""
    return bits + (16 + bits) * -(-columns // GROUP) / columns


def table_totals(records: Sequence[TableRecord], matrices: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of them: alone, and together with the matrices of the blocks."""
    weights = sum(one.rows * one.columns for one in records)
    bits = sum(one.bits_per_weight * one.rows * one.columns for one in records)
    both = bits + matrices["bits_per_weight"] * matrices["weights"]
    return {
        "weights": weights,
        "bits_per_weight": bits / weights,
        "bits_per_weight_with_matrices": both / (weights + matrices["weights"]),
        "tables": [asdict(one) for one in records],
    }


def _quantized(W: torch.Tensor, bits: int, device: torch.device | str) -> QuantizedMatrix:
    recipe = build_recipe(wbits=bits, quant="nearest", groupsize=min(GROUP, W.shape[1]))
    H = torch.eye(W.shape[1], device=device)
    return quantize_matrix(W.to(device, torch.float32), H, recipe, rng=rng_for(0, "tables"))


def _record(
    name: str, W: torch.Tensor, quantized: QuantizedMatrix, tied: str | None
) -> TableRecord:
    error = (quantized.dequantize().to(W.device) - W.float()).square().sum()
    return TableRecord(
        name=name,
        rows=len(W),
        columns=W.shape[1],
        bits_per_weight=quantized.bits_per_weight,
        error=float(error / W.float().square().sum()),
        tied=tied,
    )


def _untie(model: Any, head: str) -> None:
    """Say no more that there is a weight of the head to be tied: its codes are the embedding's."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {
        key: of for key, of in model.all_tied_weights_keys.items() if key != f"{head}.weight"
    }
