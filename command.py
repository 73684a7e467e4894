"""Functions and help texts that several command lines share."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import openmp  # noqa: F401 (the commands import this module before torch)

MODEL_HELP = "directory of a run, a checkpoint or a Hugging Face model, or a name on the hub"
DEVICE_HELP = "cuda, cuda:1, mps or cpu (default: the first of these that is available)"
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
DTYPE_HELP = (
    "precision of the matrix products. auto: bfloat16 where the processor computes in it (AVX512-BF16, AMX, Arm BF16, "
    "CUDA from Ampere on), float16 on older CUDA cards, float32 elsewhere. Use float32 for exact comparisons"
)


@contextmanager
def ending(parser: argparse.ArgumentParser, interrupted: str = "\n") -> Iterator[None]:
    """Turn exceptions in the `with` block into the end of the process.

    An error that the user can correct prints its message and gives status 2. Ctrl-C prints `interrupted` and gives
    status 130. Other exceptions keep their traceback.

    Characters that the encoding of the standard output lacks are printed as escapes, such as \\xe9.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # false if a test or another program has replaced it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, interrupted)


def at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End the process with a message if one of the named arguments is below 1; ignore absent ones and None."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
