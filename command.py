"""Functions and help texts that several command-line programs share."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, TextIO


def _report_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an uncaught exception, but only a line break for Ctrl-C.

    This function handles a Ctrl-C while modules are imported. After that, the context manager `ending` handles it.
    """
    if issubclass(kind, KeyboardInterrupt):
        print(file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# Set this before torch is imported: the import takes a second or more, so Ctrl-C may come while it runs.
sys.excepthook = _report_uncaught

try:
    import openmp  # noqa: F401 (imported here because commands import this module before torch, which loads OpenMP)
except ModuleNotFoundError as error:  # usually because .venv was not activated
    raise SystemExit(
        f"{sys.executable} lacks the package {error.name}: run `source .venv/bin/activate`, or "
        f"`pip install -r requirements.txt`"
    ) from None

CHECKPOINT_HELP = (
    "which checkpoint of a run: best (lowest validation loss), newest, or a step (default: best if eval.patience ended "
    "the run, otherwise newest)"
)


class CommandParser(argparse.ArgumentParser):
    """argparse's parser. Its error about an unknown option also names the most similar option, if there is one."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments:.*?(--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], _options(self), 1) if unknown else []
        super().error(message + (f"; did you mean {near[0]}?" if near else ""))


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a parser and its subcommands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(_options, action.choices.values()))
    return found


def add_model_options(add: Callable[..., Any], note: str = " (default: the newest run)", **options: Any) -> None:
    """Add --model and --checkpoint with `add`, the add_argument of a parser.

    The help of --model ends with `note`. `options` are passed to `add` for --model.
    """
    help_text = f"directory of a run, a checkpoint or a Hugging Face model, or a name on the hub{note}"
    add("--model", help=help_text, **options)
    add("--checkpoint", metavar="best|newest|N", help=CHECKPOINT_HELP)


def add_device_options(add: Callable[..., Any], note: str = "") -> None:
    """Add --device and --dtype with `add`, the add_argument of a parser. The help of --dtype ends with `note`."""
    help_text = (
        "precision of the matrix products. auto: bfloat16 where it is faster than float32, float16 on CUDA cards "
        f"before Ampere, float32 elsewhere. Use float32 for exact comparisons{note}"
    )
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the first of these that is available)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=help_text)


@contextmanager
def ending(parser: argparse.ArgumentParser, interrupted: str = "\n", *, needs_reader: bool = False) -> Iterator[None]:
    """End the process with a message and an exit status if the `with` block raises an exception.

    For an error that the user can correct, print its message and exit with status 2. For Ctrl-C, print `interrupted`
    and exit with status 130. Other exceptions keep their traceback.

    If the program that reads the output ends first, as in `... | head`, the command finishes its work without a
    message. With `needs_reader`, for commands whose output is the only result, it exits at once with status 0.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # false if a test or another program replaced stdout
        sys.stdout.reconfigure(errors="backslashreplace")
    with lasting_output(needs_reader=needs_reader):
        try:
            with complete_output():
                yield
        except (ValueError, OSError, FloatingPointError) as error:
            fail(f"{parser.prog}: {described(error)}")
        except KeyboardInterrupt:
            parser.exit(130, interrupted)
        except NoReader:
            sys.exit(0)


def described(error: Exception) -> str:
    """Return the message of an error. For an OSError about at most one file: the file and the reason, without errno."""
    if isinstance(error, OSError) and error.strerror and error.filename2 is None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def fail(message: str, status: int = 2, *, consequence: bool = False) -> NoReturn:
    """Print an error on stderr and end the process.

    The message is also passed to torchrun. At the end of its own long report, torchrun repeats the message of the
    process that failed first.

    Args:
        status: the exit status.
        consequence: True if this process fails because another process has failed. The reported time is then a minute
            late, so that torchrun does not take this failure for the first one.
    """
    with contextlib.suppress(OSError):  # for example, stderr is a file on a full disk
        print(message, file=sys.stderr)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # The format that torch.distributed.elastic.multiprocessing.errors reads.
        info = {"py_callstack": message, "timestamp": str(int(time.time()) + 60 * consequence)}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": info}}, file)
    sys.exit(status)


class NoReader(BaseException):
    """Raised by a write to the standard output after the program or terminal that reads it has gone away."""


class _LastingFile(io.FileIO):
    """A file descriptor that becomes /dev/null after a write has failed because the pipe or the terminal was closed.

    Other failures of a write, such as a full disk, raise OSError.
    """

    needs_reader = False  # if True, `write` raises NoReader after the pipe or the terminal was closed

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            gone = error.errno in (errno.EPIPE, errno.EIO) and not stat.S_ISREG(os.fstat(self.fileno()).st_mode)
            if not gone:
                raise
        self.silence()
        if self.needs_reader:
            raise NoReader
        return memoryview(data).nbytes

    def silence(self) -> None:
        """Make the file descriptor write to /dev/null from now on."""
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self.fileno())


@contextmanager
def lasting_output(*, needs_reader: bool = False) -> Iterator[None]:
    """In the `with` block, drop what is written to stdout and stderr after their reader has gone away.

    By default, Python raises an error for such a write: `train.py ... | head -3`, or a closed terminal, would end the
    run. With `needs_reader`, such a write to stdout raises NoReader.

    At the end of the block, text that cannot be written is dropped without an error: use `complete_output` inside the
    block. A stream that was closed before Python started (`>&-`), which is None in Python, becomes /dev/null.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_lasting(stream) for stream in before)
    if needs_reader and isinstance(raw := _raw(sys.stdout), _LastingFile):
        raw.needs_reader = True
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (NoReader, OSError):
                # Python flushes a stream once more when it deletes it, and would print an error.
                if isinstance(raw := _raw(stream), _LastingFile):
                    raw.silence()
        sys.stdout, sys.stderr = before


@contextmanager
def complete_output() -> Iterator[None]:
    """Flush stdout at the end of the `with` block, also if SystemExit ends it.

    An error of the last write to stdout, such as a full disk, is therefore raised where the caller can handle it. If
    another exception ends the block, stdout is not flushed here, so that no second error replaces the exception.
    """
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _raw(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _lasting(stream: TextIO | None) -> TextIO:
    """Return a stream like `stream` that writes to a _LastingFile, or `stream` itself if it has no descriptor.

    If `stream` is None, return a stream to /dev/null.
    """
    if stream is None:
        null = os.open(os.devnull, os.O_WRONLY)  # stays open, like the descriptors of other standard streams
        return open(null, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    raw = _raw(stream)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.FileIO):
        return stream
    stream.flush()
    file: Any = _LastingFile(raw.fileno(), "wb", closefd=False)
    # Without a buffer (`python -u`, which torchrun uses), print writes a text and its line break separately, and lines
    # of several processes can mix. Line buffering writes whole lines.
    is_unbuffered = stream.buffer is raw
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or is_unbuffered,
    )


def port_number(text: str) -> int:
    """Convert the argument of --port to an integer, for argparse."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: use a number in 0..65535 (0: any free port)")
    return int(text)


def at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End the process with a message if one of the arguments `names` is below 1. None and absent ones are allowed."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
