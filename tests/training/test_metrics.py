"""Formatting of durations."""

import pytest

from training.metrics import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59, "59 s"), (250, "4 min 10 s"), (7500, "2 h 05 min"), (273_600, "3 d 04 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
