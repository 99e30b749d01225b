"""How the matrices of a model are quantized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from quip.matrix.hessian import Observed
from quip.matrix.recipe import Recipe
from quip.model.activations import Activations
from quip.model.ledger import Ledger
from quip.model.plan import Plan
from quip.model.records import Stopwatch
from quip.model.sensitivity.found import Sensitivity
from quip.model.sides import Sides
from quip.model.states import IN_MEMORY
from quip.model.stream import Stream
from quip.model.team import ALONE, Team
from quip.model.tune.blocks import BlockTuning, TuningRecord

Shrinking: TypeAlias = float | Literal["auto"] | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """How the matrices of a model are quantized, and what is told of it on the way.

    With a ledger, finished blocks are written down; those that it holds already are taken from it
    instead of being quantized again, and come out bitwise the same. With `tuning`, what is left of
    a block is tuned after each group of matrices but the last, and after that where its centroids
    can be moved; what that comes to is added to `tuned`. `observed` is shown the Hessians of each
    block before it is touched. With `target_shrink` a matrix is rounded towards what makes up for
    so much of the errors that the matrices before cause (quip.matrix.target), and a block is tuned
    towards what the original makes of its own inputs.
    """

    recipe: Recipe | Plan  # of all matrices, or of each
    seed: int
    device: torch.device | str
    batch_size: int = 1  # windows that pass through a block together
    all_experts: bool = False
    felt: Sensitivity | None = None  # of all windows, known to the first process of a team
    sides: Sides | None = None  # of all matrices, where they are to be rounded on two sides
    weighs: bool = False  # whether tokens have the weights that were felt
    tuning: BlockTuning | None = None
    target_shrink: Shrinking = None  # from 0 to 1; None is 0
    ledger: Ledger | None = None  # of the first process of a team
    team: Team = ALONE
    stream: Stream | None = None  # where the blocks are read from; None: they are in memory
    activations: Activations = IN_MEMORY  # where hidden states live
    watch: Stopwatch = field(default_factory=Stopwatch)
    tuned: list[TuningRecord] = field(default_factory=list)
    observed: Callable[[int, Mapping[str, Observed]], None] = lambda _block, _hessians: None
