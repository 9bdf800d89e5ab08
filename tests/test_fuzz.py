"""A small form of benchmarks/fuzz.py: what a user hands in ends in success or in one clear message."""

from __future__ import annotations

import sys

import pytest
from runs import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import fuzz


def test_mutations_of_files_end_well(monkeypatch):
    monkeypatch.setenv("CLIS_CACHE", "")  # fuzz sets its own
    outcomes = list(fuzz.fuzz(seed=11, numbers=range(30)))
    assert {outcome["what"]: outcome["wrong"] for outcome in outcomes if outcome["wrong"]} == {}
    assert len({outcome["what"] for outcome in outcomes}) > 20


@pytest.mark.parametrize(
    ("raised", "wrong"),
    [
        (ValueError("a.json: no list"), None),
        (ValueError(""), "no clear message"),
        (KeyError("images"), "KeyError: 'images'"),
        (ValueError("\n".join("abcdefgh")), "a message of 8 lines"),
    ],
)
def test_what_is_wrong_is_seen(raised, wrong):
    """A fuzz run that finds nothing means something only if it would find something."""

    def attempt() -> None:
        raise raised

    found = fuzz.judge(attempt)
    assert found is None if wrong is None else wrong in found


def test_a_wait_and_a_changed_input_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LIMIT", 1)
    fifo = tmp_path / "pipe"
    fuzz.os.mkfifo(fifo)
    assert fuzz.judge(lambda: fifo.open()) == "more than 1 s"
    (tmp_path / "a").write_text("x")
    before = fuzz.digest(tmp_path)
    (tmp_path / "a").write_text("y")
    assert fuzz.digest(tmp_path) != before
