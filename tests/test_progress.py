"""Progress in a log: lines in between, and all items once."""

import io
import logging
import sys

import pytest

from saeflow import progress as module
from saeflow.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines_with_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO):
        assert list(progress(range(6), "reading", "block")) == list(range(6))
    assert "reading: 1 of 6 blocks" in caplog.text
    assert "reading: 6 blocks in" in caplog.messages[-1]


def test_short_work_leaves_the_log_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO):
        assert list(progress("abc", "reading", "block")) == ["a", "b", "c"]
    assert not caplog.messages


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress([3, 1], "reading", "block")) == [3, 1]
    assert "reading" in terminal.getvalue()
