"""Seconds of each stage of a run, for one process or several, streamed or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quip.jobs.forecast.operations import Number, attention, forward, observing, tuning
from quip.jobs.forecast.rates import Rates, Rounding, products
from quip.jobs.forecast.shape import Input, Shape
from quip.jobs.forecast.sizes import Terms, Work
from quip.matrix.recipe import Recipe

MEANS = 12  # passes over n^2 numbers, until the sums of an input are the H that quantizing takes
LARGE = 2**30  # bytes of hidden states, above which they take a tenth of the time to write
PAIRED = 4  # times the work where the groups of a block are observed one by one, in two models
ELEMENTWISE = 12  # passes over a token's numbers in a block: norms, rotations, activations, sums
DRAWN = 1.0  # seconds until there is a plot
PREDICTED = 6  # passes over the logits of a token


@dataclass(frozen=True, kw_only=True)
class Costs:
    """All that seconds are computed from."""

    shape: Shape
    terms: Terms
    rates: Rates
    works: Mapping[Input, Sequence[Work]]
    roundings: Sequence[tuple[Recipe, Rounding]]
    start: float  # seconds until config and tokenizer are there
    packed: int
    written: int  # bytes of the checkpoint

    def seconds(self, *, ranks: int, streamed: bool) -> dict[str, float]:
        """Each stage, of one of so many processes, each on a machine or device like this one."""
        shape, terms, rates = self.shape, self.terms, self.rates
        units = max(1, -(-terms.windows // terms.batch))
        tokens = terms.tokens * -(-units // ranks) / units  # of the rank with the most
        through = self._through(tokens, terms.seqlen)
        columns = [one.columns * one.share**0.5 for one in shape.inputs]
        inside = (shape.numbers - shape.outside) / shape.numbers * terms.dense_bytes
        read = inside / rates.read if streamed else 0.0
        decoded = sum(
            rounding_of(work, self.roundings).forward.of(*work.size)
            for group in self.works.values()
            for work in group
        )
        batches = tokens / (terms.batch * terms.seqlen)
        found = {
            "load": self._load(streamed),
            **({"sensitivity": self._feel(tokens, through, read)} if terms.feels else {}),
            "observe": through + (1 + terms.weighs) * observing(columns, tokens) / rates.observe,
            "replay": (terms.streams * through + batches * decoded) * (1 - 1 / shape.blocks) + read,
            "quantize": self._quantize(ranks),
        }
        if terms.streams > 1:
            found["observe"] *= PAIRED
        if terms.epochs:
            operations = tuning(shape.active, tokens, terms.epochs)
            found["tune"] = operations * len(shape.inputs) / shape.blocks / rates.product
        if terms.ledger:
            found["keep"] = self._keep(sum(found.values()))
        if terms.saves:
            written = 0 if streamed and terms.ledger else self.written
            found["save"] = DRAWN + written / rates.write
        if terms.evaluated:
            found["evaluate"] = self._evaluate(decoded, read)
        return found

    def _load(self, streamed: bool) -> float:
        """Reading, casting, and two looks at each number: whether it is finite, and its digest."""
        terms, rates = self.terms, self.rates
        cast = self.shape.numbers * terms.wide * 4 / rates.copy
        return self.start + terms.dense_bytes / rates.read + cast

    def _through(self, tokens: Number, seqlen: int) -> float:
        """Seconds of tokens on their way through all blocks."""
        shape = self.shape
        products_ = forward(shape.active, tokens) + attention(shape, tokens, seqlen) / 2
        numbers = sum(one.share * (one.columns + sum(one.rows)) for one in shape.inputs)
        moved = ELEMENTWISE * tokens * numbers * self.terms.wide / 4
        return products_ / self.rates.product + moved / self.rates.copy

    def _feel(self, tokens: Number, through: Number, read: Number) -> float:
        """Blocks run twice, then back, which takes as long as a run; the head runs once, and back.

        Its products on the way back are as many, for no weight has a gradient.
        """
        head = 2 * forward(self.shape.head, tokens) / self.rates.product
        logits = PREDICTED * 8 * tokens * self.shape.vocabulary / self.rates.copy
        return 3 * through + head + logits + 2 * read

    def _quantize(self, ranks: int) -> float:
        """The inputs of a block are dealt to ranks, the dearest first; each waits for the last."""
        total = 0.0
        for block in self.shape.in_blocks:
            busy = [0.0] * ranks
            for seconds in sorted(map(self._of_input, block), reverse=True):
                busy[busy.index(min(busy))] += seconds
            total += max(busy)
        return total

    def _of_input(self, one: Input) -> float:
        if not (self.works[one] or self.terms.windows):
            return 0.0
        means = 8 * MEANS * one.columns**2 / self.rates.copy
        return means + sum(map(self._of_work, self.works[one]))

    def _of_work(self, work: Work) -> float:
        m, n = work.size
        left = rounding_of(work, self.roundings).quantize.of(m, n)
        return products(work.recipe, self.rates, m, n) + left

    def _keep(self, rest: Number) -> float:
        """Blocks, and hidden states after each, which may take a tenth of the rest if LARGE."""
        hidden = self.terms.hidden(self.shape.width)
        seconds = hidden * (self.shape.blocks - 1) / self.rates.write
        if hidden > LARGE:
            seconds = min(seconds, rest / 10)
        return self.packed / self.rates.write + seconds

    def _evaluate(self, decoded: Number, read: Number) -> float:
        """Windows pass one at a time: each decodes all matrices, but of the original."""
        shape, terms, rates = self.shape, self.terms, self.rates
        tokens = terms.evaluated * terms.eval_seqlen
        head = forward(shape.head, tokens) / rates.product
        head += PREDICTED * 4 * tokens * shape.vocabulary / rates.copy
        once = self._through(tokens, terms.eval_seqlen) + head
        return terms.measures * (once + read) + terms.evaluated * decoded


def rounding_of(work: Work, known: Sequence[tuple[Recipe, Rounding]]) -> Rounding:
    """What was measured of the recipe of this work."""
    return next(rounding for recipe, rounding in known if recipe == work.recipe)
