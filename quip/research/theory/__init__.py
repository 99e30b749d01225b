"""The papers' theorems beside what the package measures: claims, each with a verdict."""

from quip.research.theory.claims import Claim, Settings
from quip.research.theory.groups import GROUPS, measure

__all__ = ["GROUPS", "Claim", "Settings", "measure"]
