"""Check this repository on a GPU, part by part:

    python -m scripts.gpu_check --json gpu_check.json
    python -m scripts.gpu_check --parts 1,3,8 --peer transformers --peer nanogpt=../nanoGPT
    python -m scripts.gpu_check --device cpu --tiny

docs/gpu.md describes the parts. Each part runs in a separate process, so that a part that fails or crashes does not
stop the others. No part needs a network. The third command needs no GPU: it runs every part on a CPU with tiny shapes.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.gpu_check")

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from command import CommandParser, ending
from files import check_writable, write_json
from scripts.gpu_check.inference import check_inference
from scripts.gpu_check.parity import check_parity
from scripts.gpu_check.products import check_products
from scripts.gpu_check.report import Part, Report, Settings
from scripts.gpu_check.speed import check_muon_and_micro_batch, check_profile, check_speed
from scripts.gpu_check.training import check_curves, check_distributed, check_resume

PARTS: dict[int, tuple[str, Part]] = {
    1: ("versions, products of the head, the loss", check_products),
    2: ("parity with transformers and with a CPU", check_parity),
    3: ("training speed and memory", check_speed),
    4: ("a profile of the training step", check_profile),
    5: ("loss curves", check_curves),
    6: ("kill and resume", check_resume),
    7: ("DDP and FSDP", check_distributed),
    8: ("decoding and scoring", check_inference),
    9: ("Muon and the micro-batch", check_muon_and_micro_batch),
}
TIME_LIMIT = 600.0  # seconds after which a part is killed and counts as failed


class Outcome(NamedTuple):
    """The result of a part that has ended."""

    passed: bool
    reason: str  # why the part failed, or "" if it passed
    seconds: float
    checks: list[dict[str, Any]]
    tables: list[dict[str, Any]]


def run_part(number: int, settings: Settings, limit: float = TIME_LIMIT) -> Outcome:
    """Run a part in a separate process. After `limit` seconds, the process and its child processes are killed.

    The new process is forked from this one. So this process must never use the GPU: a forked process cannot use CUDA if
    its parent has used it.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(number, settings, there))
    began = time.monotonic()
    process.start()
    there.close()
    checks: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    try:
        if here.poll(limit):
            checks, tables, reason = here.recv()
        else:
            reason = f"not finished after {limit:.0f} seconds"
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # the child may have ended meanwhile
                    child.kill()
            process.kill()
    except EOFError:
        process.join()
        reason = f"the process ended with status {process.exitcode}"
    process.join()
    here.close()
    failed = [check["name"] for check in checks if not check["passed"]]
    reason = reason or "; ".join(failed)
    return Outcome(not reason, reason, time.monotonic() - began, checks, tables)


def answer(number: int, settings: Settings, pipe: Connection) -> None:
    """Run a part in this process. Send its checks, its tables and its error ("" for none) to the parent process."""
    report, reason = Report(), ""
    try:
        PARTS[number][1](settings, report)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    pipe.send((report.checks, report.tables, reason))
    sys.stdout.flush()
    os._exit(0)  # do not wait for threads of CUDA or of a process group


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Parse the command line. Return the arguments (`args.numbers` has the chosen parts) and the settings."""
    parser = CommandParser(
        prog="python -m scripts.gpu_check",
        description="Check this repository on a GPU. docs/gpu.md describes the parts.",
    )
    parser.add_argument("--parts", default="all", help="numbers of parts such as 1,3,8 (default: all)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="device to check (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="use small shapes, to check only that everything runs")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME[=DIR]", help="transformers or nanogpt=DIR; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args(arguments)
    args.numbers = []
    for number in map(str, PARTS) if args.parts == "all" else args.parts.split(","):
        if not number.isdecimal() or int(number) not in PARTS:
            parser.error(f"--parts {args.parts}: expected numbers from 1 to {len(PARTS)}, separated by commas")
        args.numbers.append(int(number))
    peers = {name: directory for name, _, directory in (peer.partition("=") for peer in args.peer)}
    for name, directory in peers.items():
        if name not in ("transformers", "nanogpt") or (name == "nanogpt" and not Path(directory, "model.py").is_file()):
            parser.error(f"--peer {name}={directory}: expected transformers, or nanogpt=DIR with its model.py")
    args.parser = parser
    return args, Settings(device=args.device, tiny=args.tiny, peers=peers)


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts, print a summary, and return the exit status: 1 if a part failed, otherwise 0."""
    args, settings = parse_arguments(arguments)
    outcomes: dict[int, Outcome] = {}
    with ending(args.parser):
        if args.json:
            check_writable(args.json)
        for number in args.numbers:
            print(f"\npart {number}: {PARTS[number][0]}", flush=True)
            outcomes[number] = run_part(number, settings)
            if args.json:
                results = {str(n): {"title": PARTS[n][0], **outcome._asdict()} for n, outcome in outcomes.items()}
                write_json(args.json, {"device": settings.device, "tiny": settings.tiny, "parts": results})
    print()
    for number, outcome in outcomes.items():
        verdict = "PASS" if outcome.passed else f"FAIL  {outcome.reason}"
        print(f"part {number}  {PARTS[number][0]:<44}{outcome.seconds:>6.0f} s  {verdict}")
    return int(not all(outcome.passed for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
