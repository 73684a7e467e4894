"""How every command line ends: status and sentence."""

import argparse
from argparse import Namespace

import pytest

from command import at_least_one, ending


@pytest.fixture
def parser():
    return argparse.ArgumentParser(prog="python -m a.command")


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, FloatingPointError])
def test_what_a_user_can_mend_is_a_sentence_and_status_2(parser, capsys, kind):
    with pytest.raises(SystemExit) as stopped, ending(parser):
        raise kind("choose another")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "python -m a.command: choose another\n"


@pytest.mark.parametrize(("said", "more"), [("\n", {}), ("go on\n", {"interrupted": "go on\n"})])
def test_control_c_is_status_130(parser, capsys, said, more):
    with pytest.raises(SystemExit) as stopped, ending(parser, **more):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == said


def test_what_only_a_programmer_can_mend_keeps_its_traceback(parser):
    with pytest.raises(KeyError), ending(parser):
        raise KeyError("a bug")


def test_counts_below_one_are_refused_by_name(parser, capsys):
    at_least_one(parser, Namespace(limit=None, runs=1), "limit", "runs", "of_another_subcommand")
    with pytest.raises(SystemExit) as stopped:
        at_least_one(parser, Namespace(runs=1, batch_size=0), "runs", "batch_size")
    assert stopped.value.code == 2
    assert "--batch-size must be at least 1, got 0" in capsys.readouterr().err
