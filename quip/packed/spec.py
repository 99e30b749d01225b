"""What the tensors of a quantized matrix mean, in words."""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, get_type_hints

from torch import Tensor

from quip.codebooks import DECODERS, Decoder
from quip.errors import QuipError, shown
from quip.packed.matrix import QuantizedMatrix
from quip.shapes import check_shape
from quip.transforms import TRANSFORMS, Chain


@dataclass(frozen=True)
class Spec:
    """What the tensors of a quantized matrix mean: alike for all matrices of one recipe.

    A part is {"kind": its name in DECODERS or TRANSFORMS, **its options}. Raises QuipError for a
    transform that comes twice: its tensors go by the same names.
    """

    codebook: Mapping[str, Any]
    transforms: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        kinds: set[str] = set()
        for part in self.transforms:
            if part["kind"] in kinds:
                raise QuipError(
                    f"its matrices have the transform {part['kind']} twice, whose tensors have "
                    "room once; download or save the model again"
                )
            kinds.add(part["kind"])

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> "Spec":
        links = tuple(_part(TRANSFORMS, link) for link in matrix.transform.links)
        return cls(_part(DECODERS, matrix.decoder), links)

    @classmethod
    def from_json(cls, codebook: Any, transforms: list[Any]) -> "Spec":
        """Raises QuipError for a codebook or transform that this version does not know."""
        parts = [("codebook", DECODERS, codebook)]
        # One more than there are has one twice: more are not looked at.
        parts += [("transform", TRANSFORMS, part) for part in transforms[: len(TRANSFORMS) + 1]]
        for what, kinds, part in parts:
            kind = part.get("kind") if isinstance(part, Mapping) else part
            if not (isinstance(kind, str) and kind in kinds and isinstance(part, Mapping)):
                raise QuipError(
                    f"its matrices have a {what} of kind {shown(kind)}, and this version of quip "
                    f"knows {', '.join(kinds)}; upgrade quip"
                )
            try:
                _check_options(kinds[kind], _options(part))
                kinds[kind].empty(8, 8, **_options(part))  # a size that all can have
            except (ValueError, QuipError) as error:
                raise QuipError(
                    f"its matrices have a {what} {shown(part)}, which this version of quip does "
                    f"not understand ({error}); upgrade quip, or download or save the model again"
                ) from error
        return cls(codebook, tuple(transforms))

    def to_json(self) -> dict[str, Any]:
        return {"codebook": dict(self.codebook), "transforms": [dict(t) for t in self.transforms]}

    def empty(self, m: int, n: int) -> dict[str, Tensor]:
        """Every tensor of an m x n matrix, on the meta device."""
        tensors = DECODERS[self.codebook["kind"]].empty(m, n, **_options(self.codebook))
        for part in self.transforms:
            tensors |= TRANSFORMS[part["kind"]].empty(m, n, **_options(part))
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], m: int, n: int) -> tuple[Decoder, Chain]:
        """What decodes the codes, and the transform. Raises QuipError where tensors make none."""
        codebook = DECODERS[self.codebook["kind"]]
        links = tuple(
            TRANSFORMS[part["kind"]].restore(tensors, m, n, **_options(part))
            for part in self.transforms
        )
        return codebook.restore(tensors, m, n, **_options(self.codebook)), Chain(links)


def _part(kinds: Mapping[str, Any], part: Any) -> dict[str, Any]:
    kind = next(name for name, cls in kinds.items() if type(part) is cls)
    return {"kind": kind, **part.options()}


def _check_options(cls: Any, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless they are those that the class declares where it is made empty."""
    kinds = get_type_hints(cls.empty, include_extras=True)
    of_cls = signature(cls.empty).parameters.values()
    declared = {x.name: x.default for x in of_cls if x.kind is Parameter.KEYWORD_ONLY}
    needed = {name for name, default in declared.items() if default is Parameter.empty}
    if not needed <= options.keys() <= declared.keys():
        raise ValueError(f"its options are {shown([*options])}, not {[*declared]}")
    for name in declared.keys() & options.keys():
        check_shape(options[name], kinds[name], name)


def _options(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "kind"}
