"""Texts that end an answer, and are no part of it."""

from collections.abc import Sequence


class Stops:
    """Pieces of a text pass until one of the `words` is complete; it and what follows are lost.

    What may be the beginning of a word is held back until it is known.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(filter(None, words))
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """The text that certainly stands before a stop, with this piece; it may be empty."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(at + len(word), at) for word in self._words if (at := text.find(word)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]  # the first to be complete, however a text comes in pieces
        keep = max((_overlap(text, word) for word in self._words), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """The text held back, once nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of the text are the beginning of the word."""
    most = min(len(text), len(word) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(word[:size])), 0)
