"""What the outputs of a group of matrices lack, summed up over batches and processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from quip.errors import NonFinite
from quip.matrix.hessian import anchors_of, outgrown, squares
from quip.matrix.paired import INPUT, PLAIN, Paired
from quip.model.matrices import Matrix
from quip.model.observe import Outgrown
from quip.model.team import Team


@dataclass(frozen=True)
class Windows:
    """What was seen of some windows, and which of them are held out."""

    x: Float[Tensor, "windows tokens n"]
    lacking: Mapping[str, Float[Tensor, "windows tokens _m"]]  # by name of the matrix
    held: Sequence[int]
    plain: Float[Tensor, "windows tokens n"] | None = None  # x, where that is weighed

    def weighed(self, roots: Float[Tensor, "windows tokens"] | None) -> "Windows":
        """Windows whose tokens are multiplied by the roots of their weights; None: of 1."""
        if roots is None:
            return replace(self, plain=self.x)
        own = roots[..., None].to(self.x.device)
        lacking = {name: (e * own).to(e.dtype) for name, e in self.lacking.items()}
        return Windows((self.x * own).to(self.x.dtype), lacking, self.held, self.x)


class Lacking:
    """Sums of x x^T and e x^T of one input x.

    Their anchors are those of the very first batch, which the first process of a team runs; all
    keep their first batch until they know them.
    """

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        team: Team,
        anchors: dict[str, Tensor],
        *,
        holds_out: bool,
        device: torch.device,
    ) -> None:
        """`anchors`, by what they are of, are used, or else written to."""
        self._sizes = {name: (one.rows, one.columns) for name, one in matrices.items()}
        self._team, self._anchors, self._device = team, anchors, device
        self._holds_out = holds_out
        self._sums: Paired | None = None

    def add(self, windows: Windows) -> None:
        """Add a batch. In a team all processes add their first at the same time."""
        if self._sums is None:
            self._sums = self._new(windows)
        self._sums.add(windows.x, windows.lacking, windows.held, windows.plain)

    def join(self) -> Paired:
        """The sums of this process, once all know that those of all are exact and finite.

        Raises NonFinite, naming the matrix, where they are not finite, and Outgrown where they are
        not exact, with anchors to repeat the pass with.
        """
        assert self._sums is not None
        team, parts = self._team, dict(self._sums.sums())
        tokens = team.sum(torch.tensor(self._sums.count))
        found = {key: team.sum(own.squares) for key, own in parts.items()}
        for key, sums in found.items():
            if not (sums / tokens.to(sums)).float().isfinite().all():
                of_inputs = key in (INPUT, PLAIN)
                name = next(iter(self._sizes)) if of_inputs else key
                what = "inputs" if of_inputs else "outputs"
                raise NonFinite(
                    f"{name}: NaN or infinity among its {what} on the calibration tokens; load the "
                    "model as float32, or check its weights"
                )
        if team.exact and any(outgrown(x, self._anchors[key]) for key, x in found.items()):
            chunks = [team.sum(torch.tensor(own.chunks)) for own in parts.values()]
            for (key, own), count in zip(parts.items(), torch.stack(chunks).tolist(), strict=True):
                self._anchors[key] = anchors_of(team.largest(own.largest), count)
            raise Outgrown
        return self._sums

    def _new(self, first: Windows) -> Paired:
        team = self._team
        if team.exact and not self._anchors:
            seen = {INPUT: first.x, **first.lacking}
            if first.plain is not None:
                seen[PLAIN] = first.plain
            own = {key: anchors_of(squares(x.flatten(0, -2))) for key, x in seen.items()}
            self._anchors |= team.spread(None, own, 0, device=self._device)[1]
        return Paired(
            self._sizes,
            anchors=self._anchors,
            holds_out=self._holds_out,
            weighs=first.plain is not None,
            exact=team.exact,
            device=self._device,
        )
