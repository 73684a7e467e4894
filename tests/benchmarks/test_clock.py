"""The clock: contestants run in turn in processes of their own, and errors reach the parent process."""

import multiprocessing
import os
import signal
import sys
import time

import pytest

import benchmarks.clock
from benchmarks.clock import Call, answer, call_in_process, compare, serve


def make_sleeper(seconds, megabytes):
    held = bytearray(megabytes * 10**6)
    for i in range(0, len(held), 4096):
        held[i] = 1
    return lambda: time.sleep(seconds + 0 * len(held))


def make_writer(path, name):
    def write():
        with open(path, "a") as file:
            file.write(name)

    return write


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


def test_every_second_turn_is_in_reverse_order(tmp_path):
    writers = {name: Call(__name__, "make_writer", (str(tmp_path / "order"), name)) for name in "abc"}
    compare(writers, runs=3, warm_up=0)
    assert (tmp_path / "order").read_text() == "abccbaabc"


def test_a_call_imports_its_module_in_the_other_process_only():
    sys.modules.pop("colorsys", None)  # another test of this process may have imported it
    assert call_in_process("colorsys", "rgb_to_hsv", 1.0, 1.0, 1.0) == (0.0, 0.0, 1.0)
    assert "colorsys" not in sys.modules


def test_no_process_is_left_that_would_slow_down_the_next_measurement():
    call_in_process("colorsys", "rgb_to_hsv", 1.0, 1.0, 1.0)
    assert not multiprocessing.active_children()
    compare(
        {"ours": Call(__name__, "make_sleeper", (0.0, 1)), "other": Call(__name__, "make_sleeper", (0.0, 1))}, runs=1
    )
    assert not multiprocessing.active_children()


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


class Torch:
    """Stands in for torch with a GPU: records the calls of torch.cuda."""

    def __init__(self, events, initialized):
        self.cuda, self.events, self.initialized = self, events, initialized

    def is_initialized(self):
        return self.initialized

    def synchronize(self):
        self.events.append("synchronize")

    def max_memory_allocated(self):
        return 12345


class Pipe:
    """The end of a pipe in the process of a contestant, which the parent process asks for `runs` runs."""

    def __init__(self, runs):
        self.commands, self.sent = [True] * runs + [False], []

    def recv(self):
        return self.commands.pop(0)

    def send(self, value):
        self.sent.append(value)


events = []


def make_recorder():
    return lambda: events.append("run")


def exhaust():
    raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")


@pytest.mark.parametrize("initialized", [True, False])
def test_the_clock_waits_for_a_gpu_that_the_contestant_uses(monkeypatch, initialized):
    monkeypatch.setattr(benchmarks.clock, "watch_memory", lambda peak, running: None)
    monkeypatch.setitem(sys.modules, "torch", Torch(events, initialized))
    events.clear()
    pipe = Pipe(runs=1)
    serve(Call(__name__, "make_recorder"), 1, pipe)
    assert events == ["run", *(["synchronize", "run", "synchronize"] if initialized else ["run"])]
    assert (pipe.sent[-1] == 12345) == initialized


def test_a_gpu_without_free_memory_is_reported_without_a_traceback():
    pipe = Pipe(runs=0)
    serve(Call(__name__, "exhaust"), 1, pipe)
    assert isinstance(pipe.sent[0], ValueError)
    assert "compare fewer peers" in str(pipe.sent[0])


def test_a_process_ends_without_a_traceback_if_its_parent_was_killed():
    parent, own = multiprocessing.Pipe()
    parent.close()
    serve(Call(__name__, "make_recorder"), 0, own)
    answer(Call("math", "sqrt", (-1,)), own)
