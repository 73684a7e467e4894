"""Say whether a training run looks right: python -m report.doctor runs/shakespeare

The command reads the metrics and the checkpoints of the run, and the dataset if it still exists. For each problem, it
prints the evidence and advice. The exit status is 1 if a problem was found, 0 if none, and 2 if the run cannot be read.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m report.doctor")

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report.arguments import command_line


def add_arguments(add: Callable[..., Any]) -> None:
    add("run", type=Path, metavar="RUN", help="directory of a run, made by train.py")
    add("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> None:
    # imported here, so that a wrong argument is reported without waiting for the import of torch
    from report.diagnosis import diagnose

    findings = diagnose(args.run)
    problems = [finding for finding in findings if finding.problem]
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'problem' if finding.problem else 'note'}: {finding.title}\n    seen: {finding.evidence}")
            if finding.advice:
                print(f"    try:  {finding.advice}")
        print(f"{args.run}: {len(problems) or 'no'} problem{'s' * (len(problems) > 1)} found")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    command_line("report.doctor", __doc__, add_arguments, run)
