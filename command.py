"""What the command lines have in common: how they end, and what several of them say of an option."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import openmp  # noqa: F401 (the commands import this module before torch)

MODEL_HELP = "run, checkpoint or Hugging Face directory, or name on the hub"
DEVICE_HELP = "cuda, cuda:1, mps, cpu (default: the first of these there is)"
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
DTYPE_HELP = (
    "precision of the matrix products. auto: bfloat16 where the processor computes in it (AVX512-BF16, AMX, Arm BF16, "
    "CUDA from Ampere on), float16 on older CUDA cards, float32 elsewhere. Use float32 for exact comparisons"
)


@contextmanager
def ending(parser: argparse.ArgumentParser, interrupted: str = "\n") -> Iterator[None]:
    """What a user can mend ends the process with a sentence and status 2; Ctrl-C with `interrupted` and status 130."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, interrupted)


def at_least_one(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End with a sentence where one of these was given and is below 1. Those of another subcommand are passed over."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
