"""Write a page with the attention weights of a model for a text, for every layer and head.

python -m report.attention --model runs/shakespeare --text "To be, or not to be"
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m report.attention")

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import add_model_options
from report.arguments import command_line


def add_arguments(add: Callable[..., Any]) -> None:
    add_model_options(add)
    add("--text", required=True, help="input text of the model")
    add("--out", type=Path, default=Path("attention.html"), metavar="FILE", help="default: attention.html")


def run(args: argparse.Namespace) -> None:
    # imported here, so that a wrong argument is reported without waiting for the import of torch
    from report.model_pages import load_model, write_attention_page

    write_attention_page(*load_model(args.model, checkpoint=args.checkpoint), args.text, args.out)


if __name__ == "__main__":
    command_line("report.attention", __doc__, add_arguments, run)
