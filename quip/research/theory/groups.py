"""All claims, in the order of the papers."""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from tqdm import tqdm

from quip.research.theory import bounded, gaussian, rounding
from quip.research.theory.claims import Claim, Settings


class Group(NamedTuple):
    """Claims that are measured together."""

    title: str
    claims: Callable[[Settings], Iterator[Claim]]


GROUPS = {
    "theorem1": Group("Theorem 1: LDLQ", rounding.theorem_1),
    "lemma3": Group("Lemma 3: rounding without feedback", rounding.lemma_3),
    "feedback": Group("Theorem 1: LDLQ is the best of any feedback", rounding.any_feedback),
    "strictness": Group("Strictness: feedback gains unless H is diagonal", rounding.strictness),
    "lemma2": Group("Lemma 2: incoherence bounds tr D", rounding.lemma_2),
    "theorem4": Group("Theorem 4: of one spectrum, diagonal H is the worst", rounding.theorem_4),
    "lemma11": Group("Lemma 11: bounded feedback (Algorithm 5)", bounded.lemma_11),
    "lemma12": Group("Lemma 12: errors in any direction are subgaussian", bounded.lemma_12),
    "lemma13": Group("Lemma 13: bounded feedback stays inside the grid", bounded.lemma_13),
    "range": Group("Range of Gaussian weights", gaussian.ranges),
    "rotation": Group("Incoherence of random rotations", gaussian.rotations),
}


def measure(settings: Settings, only: Collection[str] = tuple(GROUPS)) -> dict[str, list[Claim]]:
    """The claims of these groups, in the order of GROUPS."""
    wanted = [name for name in GROUPS if name in only]
    found: dict[str, list[Claim]] = {}
    with tqdm(wanted, disable=None, dynamic_ncols=True, unit="group") as groups:
        for name in groups:
            groups.set_description(name)
            found[name] = list(GROUPS[name].claims(settings))
    return found
