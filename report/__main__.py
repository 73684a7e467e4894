"""Write a page about training runs: curves, evaluations, samples and configurations, beside GPT-2's results.

python -m report runs/shakespeare                     writes runs/shakespeare/report.html
python -m report runs/a runs/b --out compared.html    compares several runs
python -m report --all runs/shakespeare               also writes attention.html, tokens.html and embeddings.html
python -m report runs/a runs/b --watch                serves a page to this machine, updated during training

Without --watch, the page is one HTML file that opens offline, and every chart is also written as a PNG next to the
page. The page includes the results that eval.run wrote to .json files in the directory of a run, for example with
`python -m eval.run --model RUN --tasks hellaswag,lambada --json RUN/eval.json`
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m report")

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import CHECKPOINT_HELP, port_number
from report.arguments import command_line

PORT = 8765  # default of --port


def add_arguments(add: Callable[..., Any]) -> None:
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, made by train.py")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="HTML file to write (default: report.html in the run's directory, or in the current one for several runs)",
    )
    add("--all", action="store_true", help="write all pages about a run to its directory; the pages link to each other")
    add("--text", help="with --all: text that the pages about attention and tokens show (default: validation text)")
    add("--checkpoint", metavar="best|newest|N", help=f"with --all: {CHECKPOINT_HELP}")
    add("--watch", action="store_true", help="serve a page on 127.0.0.1 that follows the runs, until Ctrl-C")
    add("--port", type=port_number, help=f"port of --watch; 0: any free one (default: {PORT})")


def run(args: argparse.Namespace) -> None:
    if args.all and (args.watch or args.out or len(args.runs) != 1):
        raise ValueError("--all cannot be combined with --watch, --out or several runs: it writes to a run's directory")
    if args.watch and args.out:
        raise ValueError("--watch cannot be combined with --out: it writes no file")
    if not args.all and (args.text, args.checkpoint) != (None, None):
        raise ValueError("--text and --checkpoint choose what the pages of --all show: add --all, or omit them")
    if not args.watch and args.port is not None:
        raise ValueError("--port is the port of --watch: add --watch, or omit it")
    # imported here, so that a wrong argument is reported without waiting for the import of torch
    if args.watch:
        from report.live import watch

        watch(args.runs, PORT if args.port is None else args.port)
        return
    if args.all:
        from report.all_pages import write_all_pages

        write_all_pages(args.runs[0], args.checkpoint, args.text)
        return
    from report.runs_page import write_runs_page

    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    write_runs_page(args.runs, out)


if __name__ == "__main__":
    command_line("report", __doc__, add_arguments, run)
