"""A text or a conversation to tokens."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from quip.errors import UsageError, one_line


def read_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, str]]
) -> list[int]:
    """The tokens of a text, or of messages of `role` and `content` by the chat template.

    Raises UsageError for messages that the template refuses, and where there is no token.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        try:
            text = tokenizer.apply_chat_template(
                list(map(dict, prompt)), add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template may raise anything, also on purpose
            roles = ", ".join(message["role"] for message in prompt)
            raise UsageError(
                f"the chat template refuses messages of the roles {roles}: {one_line(error)}; "
                "leave out a system message, or give the prompt as plain text"
            ) from error
        # The template has written all special tokens that it wants.
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UsageError("the prompt is empty: its tokenizer makes no token of it; say more")
    return ids
