"""Write a page about training runs: curves with the results of GPT-2, evaluations, samples and configurations.

python -m report runs/shakespeare                     writes runs/shakespeare/report.html
python -m report runs/a runs/b --out compared.html    compares several runs

The page is one HTML file that opens offline. Every chart is also written as a PNG next to it. The page includes the
results that eval.run wrote to .json files in the directory of a run:
`python -m eval.run --model RUN --tasks hellaswag,lambada --json RUN/eval.json`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report.arguments import command_line


def add_arguments(add: Callable[..., Any]) -> None:
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, made by train.py")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="HTML file to write (default: report.html in the run's directory, or in the current one for several runs)",
    )


def run(args: argparse.Namespace) -> None:
    from report.runs_page import write_runs_page  # imported here: arguments are checked before torch is imported

    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    write_runs_page(args.runs, out)


if __name__ == "__main__":
    command_line("report", __doc__, add_arguments, run)
