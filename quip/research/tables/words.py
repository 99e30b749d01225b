"""What a file that describes a table may say, by its shape."""

from typing import Annotated, Any, Literal, NotRequired, TypeAlias, TypedDict

from quip.shapes import Within

Label: TypeAlias = str | int | float


class LineWords(TypedDict):
    """What a description says of a row or a column, beside its flags."""

    difference: NotRequired[list[str]]
    ratio: NotRequired[list[str]]
    published: NotRequired[bool]
    recipe: NotRequired[str]
    paper: NotRequired[dict[str, Label]]


Lines: TypeAlias = Annotated[dict[Label, LineWords | None], Within(1)]


class MeasureWords(TypedDict):
    """What a description says of a measure."""

    path: Annotated[list[str], Within(1)]
    scale: NotRequired[float]
    inverse: NotRequired[bool]
    better: NotRequired[Literal["lower", "higher", "neither"]]


class Description(TypedDict):
    """A file that describes a table; its name is the file's."""

    title: str
    source: str
    models: list[str]
    rows: Lines
    columns: Lines
    kind: NotRequired[Literal["run", "saved", "speed", "proxy", "hessians"]]
    flags: NotRequired[dict[str, Any]]
    paper: NotRequired[dict[str, Label]]
    beside: NotRequired[str]
    dataset: NotRequired[str]
    evaluate: NotRequired[list[str]]
    tasks: NotRequired[list[str]]
    measures: NotRequired[dict[str, MeasureWords] | None]
    by: NotRequired[Literal["columns", "models"]]
    note: NotRequired[str]
    cost: NotRequired[str]
