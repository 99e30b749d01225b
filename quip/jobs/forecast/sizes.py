"""Bytes of a run: what it holds in memory in each stage, and what it leaves on the disk."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from quip.jobs.forecast.shape import Input, Shape
from quip.matrix.feedback import none
from quip.matrix.prepare import asks_for_h
from quip.matrix.recipe import Recipe
from quip.model.ferry import reads_ahead
from quip.model.plan import by_recipe
from quip.packed.linear import QuantizedLinear
from quip.packed.spec import Spec
from quip.packed.stack import Stack

ENTRY = 160  # bytes of a tensor in the header of a file, and of its digest
RECORD = 320  # and of a matrix in that of a finished block
TEXT = 300_000_000  # bytes of text, its tokens, and what draws plots
# Copies of H in float64 beside the one in float32, while a matrix is quantized: without feedback,
# with it, and where H is read once more after the sweep; and rows of H that are worked on at once.
COPIES = (1.0, 1.0, 2.4)
STRIPS = 512
# Bytes a weight, of the copies that one matrix is worked on in: as it is, and after transforms; and
# of what its loss is computed from, when H is needed no more but for others of the same input.
OF_WEIGHTS, OF_TRANSFORMED, OF_LOSS = 10, 40, 16
LOGITS = 2  # copies of a window's logits


@dataclass(frozen=True)
class Work:
    """One quantization: of a matrix, or of a stack of those that read one input."""

    input: Input
    rows: tuple[int, ...]  # of each member; several are a stack
    recipe: Recipe

    @property
    def size(self) -> tuple[int, int]:
        """(m, n)."""
        return sum(self.rows), self.input.columns


def works(one: Input, recipes: Mapping[str, Recipe]) -> Iterator[Work]:
    """The quantizations of an input's matrices, as `quantize_siblings` takes them together."""
    rows = dict(zip(one.names, one.rows, strict=True))
    for group in by_recipe(one.names, recipes):
        recipe, own = recipes[group[0]], tuple(rows[name] for name in group)
        if recipe.stack and len(own) > 1 and recipe.can_do(sum(own), one.columns):
            yield Work(one, own, recipe)
        else:
            yield from (Work(one, (m,), recipe) for m in own)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a run is asked for, in numbers."""

    windows: int  # of calibration
    seqlen: int
    batch: int  # windows that pass through a block together
    wide: int  # bytes of a number in the run's dtype
    kept: int  # and of one in the files that is not quantized
    evaluated: int  # windows
    eval_seqlen: int
    measures: int  # perplexities of each of these: 2 with --compare
    dense_bytes: int  # of the weights' files
    saves: bool
    ledger: bool
    copies: float = 0.0  # of H, while a matrix is quantized
    of_weights: int = OF_WEIGHTS  # bytes a weight meanwhile
    epochs: int = 0  # of tuning block by block
    streams: int = 1  # of hidden states: 2 with those of the original model
    feels: bool = False  # whether a pass goes forward and back before the walk
    weighs: bool = False  # whether tokens weigh what is felt: second moments are summed twice

    @property
    def tokens(self) -> int:
        return self.windows * self.seqlen

    def hidden(self, width: int) -> int:
        """Bytes of hidden states."""
        return self.streams * self.tokens * width * self.wide


def copies_of(recipes: Iterable[Recipe]) -> float:
    """Copies of H that the dearest of these recipes works with."""
    kinds = (2 if asks_for_h(one) else int(one.feedback is not none) for one in recipes)
    return max((COPIES[kind] for kind in kinds), default=0.0)


def of_weights(recipes: Iterable[Recipe]) -> int:
    """Bytes a weight that the dearest of these recipes works with."""
    return max((OF_TRANSFORMED if one.transforms else OF_WEIGHTS for one in recipes), default=0)


def packed_size(work: Work, spec: Spec) -> tuple[int, int]:
    """Bytes that a file holds of a quantized matrix or stack, and of how many tensors."""
    m, n = work.size
    if len(work.rows) > 1:
        layer: QuantizedLinear = Stack(n, work.rows, spec=spec, device="meta")
    else:
        layer = QuantizedLinear(n, m, False, spec=spec, device="meta")
    stored = layer.stored().values()
    return sum(tensor.nbytes for tensor in stored), len(stored)


def disk_bytes(shape: Shape, terms: Terms, packed: int, tensors: int) -> dict[str, int]:
    """Bytes on the disk: the checkpoint; the ledger of blocks; at most, the hidden states.

    `packed` are those of so many tensors of quantized matrices.
    """
    rest = shape.numbers - shape.weights
    header = ENTRY * (tensors + shape.tensors - len(shape.matrices))
    found = {}
    if terms.saves:
        found["checkpoint"] = packed + rest * terms.kept + header
    if terms.ledger:
        inside = (rest - shape.outside) * terms.kept
        found["ledger"] = packed + inside + header + RECORD * len(shape.matrices)
        found["hidden"] = terms.hidden(shape.width)
    return found


def host_bytes(
    shape: Shape,
    terms: Terms,
    *,
    base: int,
    packed: int,
    streamed: bool,
    ranks: int,
    cuda: bool,
    free: int,
    limit: int,
) -> dict[str, int]:
    """Bytes of one process in each stage, `base` of them before there is a model.

    So many are `free`, by which a device may have its next block read beforehand; hidden states of
    more than `limit` are in a file.
    """
    base += TEXT
    outside, block = shape.outside * terms.wide, shape.block_numbers * terms.wide
    device = torch.device("cuda" if cuda else "cpu")
    blocks = block * (2 if reads_ahead(device, block, free) else 1)
    whole = shape.numbers * terms.wide
    weights = base + (outside + blocks if streamed else whole)
    hidden = terms.hidden(shape.width) // ranks
    walking = weights + (hidden if hidden <= limit else 0)
    work = Working.of(shape, terms, alone=ranks == 1)
    on_host = Working(0, 0, 0) if cuda else work
    window = terms.eval_seqlen * shape.vocabulary * LOGITS * terms.wide
    states = terms.evaluated * terms.eval_seqlen * shape.width * terms.wide if streamed else 0
    dense = outside + (blocks if streamed else packed + whole // shape.blocks)
    found = {
        "load": weights + (0 if streamed else min(terms.dense_bytes, whole)),
        "observe": walking + on_host.activations + on_host.hessians,
        "quantize": walking + on_host.quantizing,
    }
    if terms.saves and not streamed:
        found["save"] = base + outside + packed + shape.outside * terms.kept
    if terms.evaluated:
        found["evaluate"] = base + dense + states + (0 if cuda else window)
    return found


def device_bytes(shape: Shape, terms: Terms, ranks: int) -> int:
    """Bytes of tensors on a CUDA device, at most, where hidden states stay on the host."""
    work = Working.of(shape, terms, alone=ranks == 1)
    blocks = 3 * shape.block_numbers * terms.wide  # one is fetched while another goes home
    return blocks + max(work.activations + work.hessians, work.quantizing)


@dataclass(frozen=True)
class Working:
    """Bytes that the work on one block holds beside its weights, wherever it is done."""

    activations: int
    hessians: int  # sums of all inputs at once
    quantizing: int  # moments, a matrix at work; less the weights that were packed before

    @classmethod
    def of(cls, shape: Shape, terms: Terms, *, alone: bool) -> "Working":
        """In a team sums stay what they are until they are dealt to those that need them."""
        block = shape.in_blocks[0]
        dense = [one for one in block if one.share == 1]
        experts = [one for one in block if one.share < 1]
        widths = shape.width * 4 + max(sum(one.rows) for one in block) + shape.widest
        tokens = terms.batch * terms.seqlen
        kept = terms.tokens * shape.width * terms.wide if experts else 0
        # Of an expert sums and those of all of them; they are summed up one after the other.
        own = kept + 16 * max((one.columns for one in experts), default=0) ** 2
        sums = 8 * (1 + terms.weighs) * sum(one.columns**2 for one in dense)
        found = 0 if alone else sums + own + 4 * (1 + terms.weighs) * shape.widest**2
        packed, waiting = 0, sums // 2  # in float32
        for one in block:
            found = max(found, waiting + own + _of_matrix(one, terms) - packed)
            packed += one.weights * terms.wide
            waiting -= 4 * (1 + terms.weighs) * one.columns**2 if one.share == 1 else 0
        return cls(
            activations=tokens * widths * 4,
            hessians=sums + own,
            quantizing=found,
        )


def _of_matrix(one: Input, terms: Terms) -> int:
    """Bytes that the dearest matrix of an input is worked on in."""
    n, weights = one.columns, one.columns * max(one.rows)
    copies = int(terms.copies * 8 * n * n)
    strips = 8 * STRIPS * n if terms.copies else 0
    loss = OF_LOSS * weights + (copies if len(one.rows) > 1 else 0)
    return max(copies + strips + terms.of_weights * weights, loss)
