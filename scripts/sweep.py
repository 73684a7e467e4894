"""Train one configuration with several values of some fields, and print a table of the results:

    python -m scripts.sweep --config configs/shakespeare-char.yaml --seeds 1 2 3 --vary optim.muon_lr=0.01,0.02,0.04

Each combination of the values of --vary is trained with each seed, one after another, as a run in --dir. A run that has
finished is not repeated, only read. A run that diverges has a loss of inf. The last column of the table contains the
values that reproduce the row with `--vary`. `--idea` trains with a change of scripts/ideas.py. The tables of
docs/recipes.md are made with this script.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import sys
from pathlib import Path

from command import ending
from scripts.ideas import IDEAS
from train import Trainer
from training.config import parse_config
from training.metrics import read_metrics
from training.parallel import start_processes


def train_to_end(arguments: list[str], trainer_class: type[Trainer]) -> None:
    """Start or resume the run that these arguments of train.py describe, and train until it is finished."""
    config = parse_config(arguments)
    if not config.eval.every:
        raise ValueError("eval.every is 0, but runs are compared by their validation loss: set it above 0")
    trainer = trainer_class(config, start_processes(config.system))
    try:
        if trainer_class is not Trainer and 0 < trainer.step < config.optim.steps:
            raise ValueError(
                f"{trainer.directory} was interrupted at step {trainer.step}, and a checkpoint does not contain the "
                "state of an idea: delete the run to train it again"
            )
        if trainer.run() != "finished":
            raise KeyboardInterrupt
    finally:
        trainer.close()


def first_below(records: list[dict], loss: float) -> int | None:
    """Return the number of training tokens at the first validation with at most this loss, or None."""
    reached = (r["tokens"] for r in records if r["split"] == "val" and r["loss"] is not None and r["loss"] <= loss)
    return next(reached, None)


def table(args: argparse.Namespace) -> str:
    """Train the runs that are not finished, and return the table in Markdown."""
    choices = [  # split at commas outside brackets: betas=[0.9,0.95],[0.9,0.99] has two values
        [(name, value) for value in re.split(r",(?![^\[]*\])", values)]
        for name, _, values in (field.partition("=") for field in args.vary)
    ]
    rows = []
    for combination in itertools.product(*choices):
        finals, seconds, reached = [], [], []
        for seed in args.seeds:
            fields = [(name, value) for name, value in combination] + [("run.seed", str(seed))]
            parts = [Path(args.config).stem, *([args.idea] if args.idea else [])]
            name = "-".join([*parts, *(f"{n.rpartition('.')[2]}_{v}" for n, v in fields)]).replace("/", "-")
            flags = [part for n, v in fields for part in (f"--{n}", v)]
            arguments = ["--config", args.config, "--run.dir", args.dir, "--run.name", name, *flags]
            diverged = False
            try:
                train_to_end(arguments, IDEAS.get(args.idea, Trainer))
            except FloatingPointError as error:
                print(f"{name}: {error}", file=sys.stderr)
                diverged = True
            records = read_metrics(Path(args.dir) / name / "metrics.jsonl")
            final = next((r["loss"] for r in reversed(records) if r["split"] == "val"), None)
            finals.append(math.inf if diverged or final is None else final)
            seconds.append(next(r["seconds"] for r in reversed(records) if r["split"] == "train"))
            reached.append([first_below(records, loss) for loss in args.losses])
        tokens = [
            "never" if None in counts else f"{statistics.median(counts):,.0f}" for counts in zip(*reached, strict=True)
        ]
        rows.append(
            [
                f"{statistics.median(finals):.4f}",
                " ".join(f"{loss:.4f}" for loss in finals),
                *tokens,
                f"{statistics.median(seconds):.0f}",
                f"`{' '.join(f'{n}={v}' for n, v in combination)}`",
            ]
        )
    heads = ["final loss", "each seed", *(f"tokens to {loss}" for loss in args.losses), "seconds", "varied"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sweep", description="Train one configuration with several values of some fields."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration file of train.py")
    parser.add_argument(
        "--vary", nargs="*", default=[], metavar="FIELD=V,V", help="a field and the values to train with"
    )
    parser.add_argument("--idea", choices=IDEAS, help="train with one of the changes in scripts/ideas.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337], help="train each combination with these seeds")
    parser.add_argument(
        "--losses",
        nargs="*",
        type=float,
        default=[],
        help="add columns with the number of tokens needed to reach these validation losses",
    )
    parser.add_argument("--dir", default="runs/sweep", help="directory of the runs (default: %(default)s)")
    args = parser.parse_args()
    for field in args.vary:
        if "=" not in field:
            parser.error(f"--vary {field}: expected FIELD=VALUE,VALUE")
    remedy = "delete the interrupted run, then repeat" if args.idea else "to continue, repeat"
    with ending(parser, interrupted=f"\n{parser.prog}: stopped; {remedy} the same command\n"):
        print(table(args))


if __name__ == "__main__":
    main()
