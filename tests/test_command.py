"""Test how every command line ends: its status and its message."""

import argparse
import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from command import CommandParser, at_least_one, ending, fail, port_number


@pytest.fixture
def parser():
    return argparse.ArgumentParser(prog="python -m a.command")


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, FloatingPointError])
def test_an_error_that_the_user_can_correct_gives_a_message_and_status_2(parser, capsys, kind):
    with pytest.raises(SystemExit) as stopped, ending(parser):
        raise kind("choose another")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "python -m a.command: choose another\n"


def test_an_error_of_the_operating_system_begins_with_the_file(parser, capsys, tmp_path):
    for path, reason in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(SystemExit), ending(parser):
            path.read_text()
        assert capsys.readouterr().err == f"python -m a.command: {path}: {reason}\n"


def test_an_unknown_option_names_a_similar_one_also_of_a_subcommand(capsys):
    parser = CommandParser(prog="a")
    parser.add_argument("--model")
    commands = parser.add_subparsers()
    commands.add_parser("text").add_argument("--separator")
    for arguments, hint in (
        (["--modle=x"], "--modle=x; did you mean --model?\n"),
        (["--model", "y", "text", "--seperator=x"], "--seperator=x; did you mean --separator?\n"),
        (["--unlike"], "--unlike\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(arguments)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.endswith(f"unrecognized arguments: {hint}")


def commands_in_packages():
    """Return the files of the commands that are run with `python -m`."""
    root = Path(__file__).parent.parent
    others = {"tests", ".venv", "build"}
    files = [path for path in root.glob("*/**/*.py") if path.relative_to(root).parts[0] not in others]
    return [path for path in files if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]


def test_a_command_that_is_started_by_its_path_says_how_to_start_it():
    found = commands_in_packages()
    assert len(found) >= 18
    for path in found:
        result = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
        assert "Traceback" not in result.stderr, path
        assert "python -m " in result.stderr + result.stdout, path


@pytest.mark.parametrize(("message", "options"), [("\n", {}), ("go on\n", {"interrupted": "go on\n"})])
def test_control_c_gives_status_130(parser, capsys, message, options):
    with pytest.raises(SystemExit) as stopped, ending(parser, **options):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == message


def test_another_exception_keeps_its_traceback(parser):
    with pytest.raises(KeyError), ending(parser):
        raise KeyError("a bug")


def test_a_python_without_the_packages_gets_a_sentence():
    for name in ("sample.py", "train.py"):
        source = f"import sys, runpy; sys.modules['psutil'] = None; runpy.run_path({name!r}, run_name='__main__')"
        root = Path(__file__).parent.parent
        result = subprocess.run([sys.executable, "-c", source], cwd=root, capture_output=True, text=True)
        assert result.returncode == 1
        assert "lacks the package psutil: run `source .venv/bin/activate`, or `pip install" in result.stderr
        assert "Traceback" not in result.stderr


PRINTING = """
import argparse, sys, time
from command import ending
needs_reader = sys.argv[1] == "needs"
with ending(argparse.ArgumentParser(prog="a"), needs_reader=needs_reader):
    for i in range(2000):
        print("line", i, flush=i % 100 == 0)
        print("note", file=sys.stderr)
    open(sys.argv[2], "w").close()
print("after")
"""


@pytest.mark.parametrize("kind", ["needs", "outlives"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_goes_away_prints_nothing(tmp_path, kind, unbuffered):
    """It finishes its work, unless its output is its only result."""
    done = tmp_path / "done"
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTING, kind, str(done)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(), set(error.split())) == (0, {"note"})
    assert done.exists() == (kind == "outlives")


def test_a_line_is_written_in_one_piece_without_a_buffer():
    """So the lines of torchrun's processes, which run with `python -u`, do not mix."""
    code = "import argparse, sys; from command import ending\nwith ending(argparse.ArgumentParser()): print('line', 1)"
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # receives each write separately
    with here, there:
        subprocess.run([sys.executable, "-u", "-c", code], stdout=there, check=True)
        assert here.recv(100) == b"line 1\n"


def test_a_command_outlives_the_reader_of_its_errors_and_its_terminal(tmp_path):
    for name, ends in (("pipe", os.pipe()), ("terminal", os.openpty())):
        done = tmp_path / name
        process = subprocess.Popen(
            [sys.executable, "-c", PRINTING, "outlives", str(done)], stdout=ends[1], stderr=ends[1]
        )
        os.read(ends[0], 5)
        os.close(ends[1])
        os.close(ends[0])
        assert process.wait() == 0
        assert done.exists()


FULL = """
import argparse, sys
from command import ending
with ending(argparse.ArgumentParser(prog="a")):
    print("a line" * int(sys.argv[1]))
    if sys.argv[2] == "exit":
        sys.exit(0)
    if sys.argv[2] == "fail":
        raise ValueError("choose another")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("length", "end", "message"),
    [
        (1, "", "No space left on device"),
        (10_000, "", "No space left on device"),  # more than fits into a buffer
        (1, "exit", "No space left on device"),
        (1, "fail", "choose another"),
    ],
)
def test_a_full_disk_is_an_error_with_a_message(length, end, message):
    for errors, expected in ((subprocess.PIPE, f"a: {message}\n"), (subprocess.STDOUT, None)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", FULL, str(length), end], stdout=full, stderr=errors, text=True,
                env=os.environ | {"PYTHONUNBUFFERED": ""},
            )  # fmt: skip
        assert (done.returncode, done.stderr) == (2, expected)


def test_an_error_under_torchrun_is_also_given_to_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as stopped:
        fail("a.py: no such dataset", 3)
    assert (stopped.value.code, capsys.readouterr().err) == (3, "a.py: no such dataset\n")
    first = json.loads((tmp_path / "error.json").read_text())["message"]
    assert first["message"] == "a.py: no such dataset"
    with pytest.raises(SystemExit):
        fail("a.py: lost another process", 1, consequence=True)
    second = json.loads((tmp_path / "error.json").read_text())["message"]
    assert int(second["extraInfo"]["timestamp"]) > int(first["extraInfo"]["timestamp"]) + 30


def test_an_error_file_that_cannot_be_written_does_not_hide_the_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing" / "error.json"))
    with pytest.raises(SystemExit) as stopped:
        fail("a.py: no such dataset")
    assert (stopped.value.code, capsys.readouterr().err) == (2, "a.py: no such dataset\n")


def test_a_command_may_be_started_without_an_output():
    """With `>&-`, sys.stdout is None, and with `2>&-`, sys.stderr is."""
    source = "import argparse, sys, command\nwith command.ending(argparse.ArgumentParser()):\n"
    source += " for stream in (sys.stdout, sys.stderr): print(stream.isatty(), file=stream)"
    for closed, output in ((">&-", ("", "False\n")), ("2>&-", ("False\n", "")), (">&- 2>&-", ("", ""))):
        shell = f'exec "{sys.executable}" -c "{source}" {closed}'
        root = Path(__file__).parent.parent
        result = subprocess.run(shell, shell=True, cwd=root, capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, *output)


def test_an_impossible_port_is_refused(parser, capsys):
    parser.add_argument("--port", type=port_number)
    assert parser.parse_args(["--port", "65535"]).port == 65535
    for port in ("65536", "-1", "http"):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([f"--port={port}"])
        assert stopped.value.code == 2
        assert f"{port} is not a port: use a number in 0..65535" in capsys.readouterr().err


def test_a_number_below_one_is_refused_with_the_name_of_the_option(parser, capsys):
    at_least_one(parser, Namespace(limit=None, runs=1), "limit", "runs", "of_another_subcommand")
    with pytest.raises(SystemExit) as stopped:
        at_least_one(parser, Namespace(runs=1, batch_size=0), "runs", "batch_size")
    assert stopped.value.code == 2
    assert "--batch-size must be at least 1, got 0" in capsys.readouterr().err
