"""Windows shared by several processes are measured to the same bits, however few there are."""

import copy

import pytest

from quip.evaluate.divergence import divergence
from quip.evaluate.perplexity import perplexity
from quip.model.team import Team
from tests.support.teams import together
from tests.support.tiny import tokens
from tests.support.tuning import quantized, short

# Windows, windows a batch, processes: some have a batch more, a short one, or none at all.
CASES = [(7, 1, 2), (7, 2, 3), (2, 1, 3)]


@pytest.fixture(scope="module")
def student():
    return quantized()[0]


@pytest.mark.parametrize(("count", "batch_size", "size"), CASES)
def test_a_team_measures_what_one_does(student, count, batch_size, size):
    def measured(team: Team):
        models = [copy.deepcopy(student), short()]
        how = {"device": "cpu", "batch_size": batch_size, "team": team}
        ids = tokens(count)
        return perplexity(models[0], ids, **how), divergence(*models, ids, **how)

    expected = measured(Team())
    assert together(size, measured) == [expected] * size
