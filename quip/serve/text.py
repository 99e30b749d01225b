"""Tokens to text, as they come: a token is no character, and several may make one."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character yet


class IncrementalDecoder:
    """Tokens to text, as they come: pieces of whole characters that join to the whole text.

    A token may hold a part of a character, and what it says may depend on the one before (whether
    it begins with a space, in many tokenizers). So each piece is what a token adds to the text of
    a few tokens before it, and it is held back while its last bytes are no character yet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> None:
        """The text goes on after the tokens `before`, which are not part of it."""
        self._tokenizer = tokenizer
        self._window = list(before)  # the tokens of the last piece, and those held back
        self._said = len(self._window)  # how many of these are those of the last piece

    def add(self, token: int) -> str:
        """The text that this token completes; it may be empty."""
        self._window.append(token)
        piece = self.rest()
        if not piece or piece.endswith(HALF):
            return ""
        self._window = self._window[self._said :]
        self._said = len(self._window)
        return piece

    def rest(self) -> str:
        """The text of the tokens that are held back, whole characters or not."""
        said, text = self._decode(self._window[: self._said]), self._decode(self._window)
        return text[len(said) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)
