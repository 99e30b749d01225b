"""The sizes that decide what a run on a model takes: from its config alone, no weight is read."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quip.evaluate.memory import module_bytes
from quip.model.matrices import Matrix, covered, find_blocks
from quip.packed.experts import unfuse

# Last names of matrices that read one input, where they belong to one module.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a block, n numbers a token, and the rows of the matrices that read it."""

    block: int
    columns: int
    names: tuple[str, ...]  # of the matrices that read it
    rows: tuple[int, ...]  # of each of them
    share: float = 1.0  # of all tokens: the part that reaches an expert

    @property
    def weights(self) -> int:
        return self.columns * sum(self.rows)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model decides the cost; sizes in numbers, whatever their type."""

    inputs: tuple[Input, ...]
    head: int  # weights that turn hidden states into logits
    numbers: int  # all parameters and buffers
    outside: int  # those outside the blocks
    block_numbers: int  # those of the first block
    blocks: int
    width: int
    vocabulary: int
    attention: int  # the heads' numbers of a token: query heads x their size
    positions: int
    tensors: int

    @cached_property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(m, n) of each matrix that is quantized."""
        return tuple((m, one.columns) for one in self.inputs for m in one.rows)

    @property
    def weights(self) -> int:
        """Weights that are quantized."""
        return sum(one.weights for one in self.inputs)

    @property
    def active(self) -> float:
        """Weights that a token meets in the blocks: of experts, those that it is sent to."""
        return sum(one.share * one.weights for one in self.inputs)

    @property
    def in_blocks(self) -> tuple[tuple[Input, ...], ...]:
        """The inputs of each block."""
        found: list[list[Input]] = [[] for _ in range(self.blocks)]
        for one in self.inputs:
            found[one.block].append(one)
        return tuple(map(tuple, found))

    @property
    def widest(self) -> int:
        """The most inputs that a matrix has."""
        return max(one.columns for one in self.inputs)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config, its experts apart, without content (on the meta device)."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    unfuse(model)
    return model


def shape_of(empty: PreTrainedModel) -> Shape:
    """The sizes of a model. Raises UnsupportedModel where its matrices cannot be walked over."""
    _, blocks = find_blocks(empty)
    text = empty.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    numbers, inside = module_bytes(empty) // 4, module_bytes(blocks) // 4
    return Shape(
        inputs=tuple(_inputs(empty)),
        head=text.vocab_size * text.hidden_size,
        numbers=numbers,
        outside=numbers - inside,
        block_numbers=module_bytes(blocks[0]) // 4,
        blocks=len(blocks),
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        attention=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        positions=getattr(text, "max_position_embeddings", 2048),
        tensors=len(empty.state_dict()),
    )


def _inputs(model: PreTrainedModel) -> Iterator[Input]:
    start = len(find_blocks(model)[0]) + 1
    groups: dict[tuple[str, ...], list[Matrix]] = {}
    for matrix in covered(model):
        owner, _, last = matrix.name.rpartition(".")
        kin = next((group for group in SIBLINGS if last in group), (last,))
        groups.setdefault((owner, *kin), []).append(matrix)
    share = _share_of_experts(model, [*groups])
    for (owner, *_), own in groups.items():
        yield Input(
            block=int(f"{owner}."[start:].partition(".")[0]),
            columns=own[0].columns,
            names=tuple(matrix.name for matrix in own),
            rows=tuple(matrix.rows for matrix in own),
            share=share if EXPERT.search(f"{owner}.") else 1.0,
        )


def _share_of_experts(model: PreTrainedModel, owners: Sequence[tuple[str, ...]]) -> float:
    """The part of all tokens that an expert is sent, if all are sent as many."""
    text = model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    first = next((name for name, *_ in owners if EXPERT.search(f"{name}.")), None)
    if first is None:
        return 1.0
    start = first.rpartition(".experts.")[0]
    count = len({name for name, *_ in owners if name.startswith(f"{start}.experts.")})
    return float(min(1.0, chosen / count))
