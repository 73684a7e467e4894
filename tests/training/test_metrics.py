"""What a run shows while it trains: durations, lines and a bar."""

import io
import math
import sys

import pytest

from training.metrics import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59, "59 s"), (250, "4 min 10 s"), (7500, "2 h 05 min"), (273_600, "3 d 04 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_progress_is_plain_lines(capsys):
    progress = Progress(4, 40, 3, enabled=True, bytes_per_token=2.0)
    for step in range(5, 8):
        progress.update(step, 2 * math.log(2), "9 tokens/s")
    progress.show_sample(["HAMLET:\n\n  To be\x1b[2J", "another"])
    progress.show_sample([])
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("step      6/40  loss 1.3863  1.00 bits/byte  9 tokens/s  ")
    assert first.endswith(" s left")
    assert second == "             HAMLET: / To be?[2J"
    assert err == ""


def test_a_message_is_divided_between_words_only_on_a_terminal(monkeypatch, capsys):
    message = "1 x cpu, float32 (as configured), micro-batches of 8 x 256\n             a line that fits"
    progress = Progress(0, 40, 3, enabled=True)
    progress.say(message)
    assert capsys.readouterr().out == message + "\n"
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", Terminal())
    progress.say(message + "\n" + "/a-long/path" * 4)
    assert sys.stdout.getvalue().splitlines() == [
        "1 x cpu, float32 (as configured),",
        "    micro-batches of 8 x 256",
        "             a line that fits",
        "/a-long/path" * 4,
    ]


@pytest.mark.parametrize(
    ("no_color", "term", "colored"), [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)]
)
def test_on_a_terminal_progress_is_one_line_of_its_width(monkeypatch, no_color, term, colored):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(0, 40, 3, enabled=True, bytes_per_token=None)
    for step in range(1, 41):
        progress.update(step, 1.5, "9 tokens/s")
    progress.close()
    shown = sys.stderr.getvalue()
    assert ("\x1b[" in shown) == colored
    last = shown.split("\r")[-1].rstrip("\n")
    assert last.startswith("step 40/40 ")
    assert last.endswith("loss 1.5000  9 tokens/s  0.0 s left")
    if not colored:
        assert "#" in last or "█" in last
