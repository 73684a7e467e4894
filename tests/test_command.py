"""Test how every command line ends: its status and its message."""

import argparse
from argparse import Namespace

import pytest

from command import at_least_one, ending


@pytest.fixture
def parser():
    return argparse.ArgumentParser(prog="python -m a.command")


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, FloatingPointError])
def test_an_error_that_the_user_can_correct_gives_a_message_and_status_2(parser, capsys, kind):
    with pytest.raises(SystemExit) as stopped, ending(parser):
        raise kind("choose another")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "python -m a.command: choose another\n"


@pytest.mark.parametrize(("message", "options"), [("\n", {}), ("go on\n", {"interrupted": "go on\n"})])
def test_control_c_gives_status_130(parser, capsys, message, options):
    with pytest.raises(SystemExit) as stopped, ending(parser, **options):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == message


def test_another_exception_keeps_its_traceback(parser):
    with pytest.raises(KeyError), ending(parser):
        raise KeyError("a bug")


def test_a_number_below_one_is_refused_with_the_name_of_the_option(parser, capsys):
    at_least_one(parser, Namespace(limit=None, runs=1), "limit", "runs", "of_another_subcommand")
    with pytest.raises(SystemExit) as stopped:
        at_least_one(parser, Namespace(runs=1, batch_size=0), "runs", "batch_size")
    assert stopped.value.code == 2
    assert "--batch-size must be at least 1, got 0" in capsys.readouterr().err
