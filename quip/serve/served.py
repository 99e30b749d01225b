"""The model that is served: its names, its limits, and requests as texts to write."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quip.errors import UsageError, shown
from quip.packed.checkpoint import positions
from quip.serve.engine import Ask
from quip.serve.generate import room_after
from quip.serve.prompts import read_prompt
from quip.serve.refused import Refused
from quip.serve.requests import Asked, Prompt
from quip.serve.sampling import Sampling

TOKENS = (
    16  # of a text that says nothing of max_tokens, as OpenAI has it; a chat goes on to its end
)
MOST = 1 << 17  # tokens of a prompt, and of a text, where positions are not limited
SEEDS = 1 << 63  # torch's generators take no more
NO_TEMPLATE = (
    "the model has no chat template: use /v1/completions, or start the server with "
    "--chat_template FILE"
)


@dataclass(frozen=True)
class Served:
    """A model under its name, and adapters of it under theirs."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapters: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.adapters)

    @property
    def chats(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @cached_property
    def limit(self) -> int:
        """How many tokens a prompt, and what follows it, may have."""
        return positions(self.model.config) or MOST

    @cached_property
    def words(self) -> int:
        """How many tokens the model knows."""
        table: Any = self.model.get_input_embeddings()
        return int(table.weight.shape[0])

    def asks(self, asked: Asked) -> list[Ask]:
        """The texts that a request asks for. Raises Refused for what cannot be written."""
        adapter = self._adapter(asked.model)
        if asked.chat and not self.chats:
            raise Refused(NO_TEMPLATE, code="no_chat_template")
        sampling = self._sampling(asked)
        if asked.seed is not None and not -SEEDS < asked.seed < SEEDS:
            raise Refused(f"seed {asked.seed}: a seed has at most 63 bits")
        if "" in asked.stops:
            raise Refused("stop holds an empty text, which would end every answer; leave it out")
        asks = []
        for prompt in asked.prompts:
            ids = self._tokens(prompt)
            echo = prompt if isinstance(prompt, str) else str(self.tokenizer.decode(ids))
            asks.append(
                Ask(
                    ids=ids,
                    max_new_tokens=self._most(asked, len(ids)),
                    sampling=sampling,
                    seed=asked.seed,
                    stops=asked.stops,
                    top=asked.top,
                    echo=echo if asked.echo else None,
                    chat=asked.chat,
                    adapter=adapter,
                )
            )
        return asks

    def _adapter(self, name: str | None) -> str | None:
        if name is None or name == self.name:
            return None
        if name not in self.adapters:
            raise Refused(
                f"model {shown(name)} is not served here; name one of {', '.join(self.names)}",
                status=404,
                code="model_not_found",
            )
        return name

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
            ids: list[int] = prompt  # type: ignore[assignment]
            if strange := [token for token in ids if not 0 <= token < self.words]:
                raise Refused(f"token {strange[0]} is none of the model's {self.words}")
            if not ids:
                raise Refused("the prompt is empty: say more")
        else:
            try:
                ids = read_prompt(self.tokenizer, prompt)  # type: ignore[arg-type]
            except UsageError as error:
                raise Refused(str(error)) from error
        try:
            room_after(self.model, len(ids), "shorten it")
            if len(ids) > self.limit:
                raise UsageError(f"the prompt has {len(ids)} tokens, above {MOST}; shorten it")
        except UsageError as error:
            raise Refused(str(error), code="context_length_exceeded") from error
        return ids

    def _most(self, asked: Asked, prompt_tokens: int) -> int:
        """How many tokens may follow the prompt, where the last position predicts one as well."""
        room = self.limit - prompt_tokens + 1
        most = asked.max_tokens
        if most is None:
            return room if asked.chat else min(TOKENS, room)
        least = 0 if asked.echo else 1
        if not least <= most <= self.limit:
            raise Refused(
                f"max_tokens {most}: from {least} to the {self.limit} positions of the model"
            )
        return min(most, room)

    def _sampling(self, asked: Asked) -> Sampling:
        """What is asked for; where it says nothing, what the model's generation_config says."""
        temperature, top_k, top_p = asked.temperature, asked.top_k, asked.top_p
        if temperature is None:
            own = self.model.generation_config
            if own is not None and own.do_sample:
                temperature = 1.0 if own.temperature is None else own.temperature
                top_k = top_k or own.top_k or None
                top_p = own.top_p if top_p is None else top_p
            else:
                temperature = 0.0 if top_p is None and not top_k else 1.0
        if temperature == 0:
            return Sampling()  # the likeliest token is the first of any nucleus
        try:
            return Sampling(temperature=temperature, top_k=_some(top_k), top_p=top_p)
        except UsageError as error:
            raise Refused(str(error)) from error


def _some(top_k: int | None) -> int | None:
    """None for what means all tokens."""
    return None if top_k in (None, 0, -1) else top_k
