"""Processes of a team that are not alike: one line says what differs, and where."""

import pytest

from quip.errors import UsageError
from quip.jobs import alike
from quip.jobs.alike import check_alike, check_request
from quip.jobs.requests import Machine
from quip.model.team import Team
from tests.support.teams import together

HERE = {"versions": {"torch": "2.13", "numpy": "2.0"}, "threads": 1}


def refusals(size: int, found) -> list[str]:
    def refused(team: Team) -> str:
        with pytest.raises(UsageError) as error:
            check_alike(team, found(team.rank))
        return str(error.value)

    return together(size, refused)


def test_processes_that_are_alike_are_not_refused():
    def check(team: Team) -> None:
        check_alike(team, HERE)
        check_request(team, Machine(device="cpu"), "cpu")

    together(3, check)
    check(Team())


def test_what_differs_is_named_with_its_values_and_processes(monkeypatch):
    monkeypatch.setattr(alike.socket, "gethostname", lambda: "node")

    def found(rank: int):
        other = {"versions": {"torch": "2.12", "numpy": "2.0"}, "threads": 1, "more": 1}
        return other if rank == 1 else HERE

    said = set(refusals(3, found))
    assert said == {
        "the processes are not alike: versions.torch: 2.13 in process 0 (node) and 1 more; 2.12 in "
        "process 1 (node) | more: missing in process 0 (node) and 1 more; 1 in process 1 (node); "
        "start all of them with the same program, flags and files"
    }


def test_many_differences_are_counted():
    said = refusals(2, lambda rank: {str(i): rank for i in range(9)})
    assert all(" | 4 more; start all of them" in line for line in said)


def test_a_request_is_compared_by_its_fields():
    def refused(team: Team) -> str:
        asked = Machine(device="cpu", dtype=["float32", "bfloat16"][team.rank])
        with pytest.raises(UsageError) as error:
            check_request(team, asked, "cpu")
        return str(error.value)

    assert all("asked for.dtype: float32 in process 0 (" in line for line in together(2, refused))
