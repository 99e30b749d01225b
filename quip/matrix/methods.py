"""The papers' table of methods: order, feedback, passes."""

from dataclasses import dataclass

from quip.matrix.feedback import Feedback, admm, coordinate, ldl, none
from quip.matrix.order import Order, backwards, largest_first, natural


@dataclass(frozen=True)
class Method:
    """One row of the papers' method table."""

    order: Order
    feedback: Feedback
    passes: int  # greedy passes by default
    swept_passes: int  # passes that the sweep itself already is
    title: str


METHODS = {
    "nearest": Method(natural, none, 0, 0, "each weight to its nearest level"),
    "gptq": Method(natural, ldl, 0, 0, "OPTQ (GPTQ): LDLQ from first column to last"),
    "ldlq": Method(backwards, ldl, 0, 0, "QuIP: optimal linear feedback"),
    "ldlqRG": Method(largest_first, ldl, 10, 0, "QuIP-RG: LDLQ by diag(H), then greedy"),
    "allbal": Method(largest_first, coordinate, 10, 1, "greedy updates alone"),
    "ldlbal_admm": Method(largest_first, admm, 0, 0, "QuIP Algorithm 5, bounded feedback"),
}
