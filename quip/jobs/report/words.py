"""What run.json says, as far as it is read again: the shapes that a file must have."""

from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

Number: TypeAlias = float | Literal["nan", "inf", "-inf"]  # JSON has no others
Scores: TypeAlias = dict[str, dict[str, Number | None]]


class Windows(TypedDict):
    """The stamp of the tokens that a perplexity was taken over."""

    dataset: str
    windows: int
    seqlen: int


class FineTuned(TypedDict):
    """What `quip finetune` adds, as far as it is shown."""

    kl_before: float
    kl_after: float
    teacher: str
    epochs: int


class Experts(TypedDict):
    """How many tokens the matrices of experts saw, and how many saw fewer than their inputs."""

    matrices: int
    fewest_tokens: int
    median_tokens: Number
    most_tokens: int
    short: int
    idle: int


class Totals(TypedDict):
    """Totals over all matrices; of a cell of a table perhaps the first alone."""

    bits_per_weight: Number
    matrices: NotRequired[int]
    weights: NotRequired[int]
    mean_proxy_loss: NotRequired[Number]
    mean_plain_loss: NotRequired[Number]
    damage: NotRequired[Number]
    experts: NotRequired[Experts]


class Tables(TypedDict):
    """What `--head_bits` made of embedding and head."""

    bits_per_weight: Number
    bits_per_weight_with_matrices: Number


class RunWords(TypedDict, total=False):
    """The report of a run, an evaluation, a bench or a cell of a table, at any stage."""

    model: str | None
    dataset: str | None
    method: str | None
    status: str
    recipe: dict[str, Any] | None
    flags: dict[str, Any] | None
    calibration: dict[str, Any] | None
    fingerprint: dict[str, Any] | None
    versions: dict[str, str]
    evaluation: dict[str, Windows]
    perplexity: dict[str, Number] | None
    original_perplexity: dict[str, Number] | None
    tasks: Scores | None
    divergence: Scores | None
    agreement: Scores | None
    tasks_asked: dict[str, list[str]]
    totals: Totals | None
    tables: Tables | None
    finetune: FineTuned | None
    seconds: dict[str, float]
    peak_memory: dict[str, float]
    matrices: list[dict[str, Any]] | int | None  # in a cell of losses, how many


class CodebookWords(TypedDict):
    """A codebook, as far as a card shows it."""

    bits: NotRequired[int | float | None]


class RecipeWords(TypedDict):
    """A recipe, as far as a card shows it."""

    codebook: NotRequired[CodebookWords | None]


class WholeTotals(TypedDict):
    """Totals over all matrices of a run."""

    bits_per_weight: Number
    matrices: int
    weights: int
    mean_proxy_loss: Number


class CardFlags(TypedDict):
    """Flags of a run that a card reads otherwise than as a word."""

    plan: NotRequired[dict[str, Any] | None]


class CardWords(RunWords, total=False):
    """The report of a checkpoint, of which another checkpoint's card is made."""

    recipe: RecipeWords | None  # type: ignore[misc]
    flags: CardFlags | None  # type: ignore[misc]
    totals: WholeTotals | None  # type: ignore[misc]


class MeasuredWords(TypedDict, total=False):
    """What several runs of a cell of a table measured."""

    fingerprint: dict[str, Any] | None
    files: dict[str, Any]
    perplexity: dict[str, Number]
    tasks: Scores
    divergence: Scores
    agreement: Scores
