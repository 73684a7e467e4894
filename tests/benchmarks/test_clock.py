"""The clock: contestants run in turn in processes of their own, and errors reach the parent process."""

import os
import signal
import sys
import time

import pytest

from benchmarks.clock import Call, call_in_process, compare


def make_sleeper(seconds, megabytes):
    held = bytearray(megabytes * 10**6)
    for i in range(0, len(held), 4096):
        held[i] = 1
    return lambda: time.sleep(seconds + 0 * len(held))


def fail():
    raise ValueError("nothing to measure")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_contestants_are_timed_and_the_memory_of_each_is_its_own():
    sleepers = {"ours": Call(__name__, "make_sleeper", (0.01, 1)), "other": Call(__name__, "make_sleeper", (0.03, 300))}
    results = compare(sleepers, runs=3)
    assert results["other"]["seconds"] / results["ours"]["seconds"] == pytest.approx(3, rel=0.5)
    assert results["other"]["peak_memory"] - results["ours"]["peak_memory"] > 250e6
    assert all(result["lowest"] <= result["seconds"] <= result["highest"] for result in results.values())


def test_a_call_imports_its_module_in_the_other_process_only():
    sys.modules.pop("colorsys", None)  # another test of this process may have imported it
    assert call_in_process("colorsys", "rgb_to_hsv", 1.0, 1.0, 1.0) == (0.0, 0.0, 1.0)
    assert "colorsys" not in sys.modules


def test_the_error_of_another_process_is_raised_here():
    with pytest.raises(ValueError, match="nothing to measure"):
        call_in_process(__name__, "fail")
    with pytest.raises(ValueError, match="nothing to measure"):
        compare({"ours": Call(__name__, "fail")}, runs=1)


def test_a_killed_process_is_reported():
    with pytest.raises(ChildProcessError, match="ended without a result"):
        call_in_process(__name__, "die")
    with pytest.raises(ChildProcessError, match="ended without a result"):
        compare({"ours": Call(__name__, "die")}, runs=1)
