"""Write a page with the position embeddings of a model: an image, curves of single dimensions, and similarities.

python -m report.embeddings --model runs/shakespeare
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m report.embeddings")

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import add_model_options
from report.arguments import command_line


def add_arguments(add: Callable[..., Any]) -> None:
    add_model_options(add)
    add("--out", type=Path, default=Path("embeddings.html"), metavar="FILE", help="default: embeddings.html")


def run(args: argparse.Namespace) -> None:
    # imported here, so that a wrong argument is reported without waiting for the import of torch
    from report.model_pages import load_model, write_embeddings_page

    model, _, name = load_model(args.model, checkpoint=args.checkpoint)
    write_embeddings_page(model, name, args.out)


if __name__ == "__main__":
    command_line("report.embeddings", __doc__, add_arguments, run)
