"""How the next token is chosen. Without torch, so that a command line is refused at once."""

from dataclasses import dataclass

from quip.errors import UsageError

COLDEST = 1e-4  # logits over a smaller temperature may leave the range of float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that each next token is drawn from; by default it is the likeliest token.

    With temperature T > 0, a token of logit z has probability proportional to exp(z / T), among
    the `top_k` likeliest tokens (None: all), and of these among the fewest whose probabilities sum
    to `top_p` or more (None: all). Raises UsageError for values that mean nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not COLDEST <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature {self.temperature}: 0 (the likeliest token, always) or a number of "
                f"at least {COLDEST} is needed"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k {self.top_k}: at least 1 is needed")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}: above 0 and at most 1 is needed")
        for name in ("top_k", "top_p"):
            value = getattr(self, name)
            if not self.draws and value is not None:
                raise UsageError(
                    f"{name} {value} speaks of drawing at random: add a temperature above 0"
                )

    @property
    def draws(self) -> bool:
        """Whether chance has a part in it."""
        return self.temperature > 0

    @property
    def keywords(self) -> dict[str, object]:
        """What generate() is asked for; none of it is left to the model's generation_config."""
        if not self.draws:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            # Off, all of them.
            "min_p": 0.0,
            "typical_p": 1.0,
            "epsilon_cutoff": 0.0,
            "eta_cutoff": 0.0,
        }
