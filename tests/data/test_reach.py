"""A hub that does not answer is given up on once, and what is cached is used."""

import logging
import socket
import time

import pytest
from huggingface_hub import constants

from quip.data import reach
from quip.data.reach import reach_hub


@pytest.fixture
def hub(monkeypatch):
    """An address that takes connections and says nothing, as where packets vanish."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(reach, "ANSWERED", {})
        monkeypatch.setattr(reach, "SECONDS", 0.4)
        monkeypatch.setattr(reach, "SILENCE", 0.1)
        yield endpoint
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_hub_that_says_nothing_is_given_up_on_once_and_aloud(hub, caplog):
    start = time.monotonic()
    with caplog.at_level(logging.INFO, "quip"):
        reach_hub("facebook/opt-125m")
    assert constants.HF_HUB_OFFLINE
    assert time.monotonic() - start < 10
    assert [record.getMessage() for record in caplog.records] == [
        f"asking {hub} for facebook/opt-125m",
        f"waiting for {hub} to answer (facebook/opt-125m)",
        f"{hub} does not answer (asked for 0.4 s): going on with what is cached on this machine",
    ]
    caplog.clear()
    reach_hub("another")
    assert not caplog.records


def test_an_answer_of_any_kind_leaves_the_hub_alone(hub, monkeypatch, caplog):
    monkeypatch.setattr(reach, "_ask", lambda: True)
    reach_hub("x")
    assert not constants.HF_HUB_OFFLINE
    assert not caplog.records


def test_nobody_is_asked_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(reach, "_ask", None)
    reach_hub("x")
    assert reach.ANSWERED == {}
