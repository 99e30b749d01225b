"""How long greedy texts of a model and its original stay the same, measured in a job."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from quip.data import TokenSet
from quip.evaluate.agreement import agreement, prompts_from
from quip.jobs.report.report import Report
from quip.jobs.tasks import bar_wanted, named
from quip.model.load import LoadedModel
from quip.model.records import Stopwatch
from quip.model.team import Team

PROMPT, NEW = 64, 32  # tokens, where the model has positions for them
log = logging.getLogger(__name__)


def measure_agreement(
    token_sets: Mapping[str, TokenSet],
    loaded: LoadedModel,
    reference: LoadedModel,
    report: Report,
    watch: Stopwatch,
    count: int,
    *,
    team: Team,
) -> None:
    """The agreement of both models on so many prompts of each data set."""
    room = min(loaded.max_length, reference.max_length)
    found: dict[str, Any] = {}
    for name, tokens in token_sets.items():
        length = min(PROMPT, room // 2, tokens.seqlen)
        with watch("evaluate"), named(name):
            same = agreement(
                loaded.model,
                reference.model,
                prompts_from(tokens.ids, count=count, length=length),
                new_tokens=min(NEW, room - length),
                device=report.device,
                progress=bar_wanted(),
                team=team,
            )
        found[name] = asdict(same)
        log.info("%s: greedy texts agree in %.1f%% of their tokens", name, 100 * same.prefix)
        report.save("evaluating", agreement=found)
