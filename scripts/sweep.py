"""Train one configuration in several ways, and print a table of the results:

    python -m scripts.sweep --config configs/shakespeare-char.yaml --seeds 1 2 3 --vary optim.muon_lr=0.01,0.02,0.04

Every combination of the values given with --vary is trained with every seed. The runs are written to --dir. A run that
has finished already is not repeated: its results are read. A run that diverges gets a loss of inf. To reproduce a row
of the table, pass its last column to --vary.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.sweep")

import argparse
import itertools
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from command import CommandParser, ending
from processes import start_processes
from scripts.ideas import IDEAS, Idea, find_idea
from train import is_done, train
from training.config import parse_config
from training.launch import restored_handlers
from training.run_directory import read_metrics
from training.setup import setup

# Fields that a sweep sets itself for each run, and what to do instead of varying them.
OWN_FIELDS = {"run.seed": "use --seeds", "run.dir": "use --dir", "run.name": "each run is named by the varied values"}


def finish(arguments: list[str], idea: type[Idea] | None) -> None:
    """Train a run until it ends. `arguments` are those of train.py. `idea`, if given, changes the training.

    Raises:
        ValueError: the run has no validations, or cannot be continued because an idea's state is not stored.
        FloatingPointError: the run diverged.
        KeyboardInterrupt: a stop request ended the run.
    """
    config = parse_config(arguments)
    if not config.eval.every:
        raise ValueError("eval.every is 0: set it, because runs without a validation cannot be compared")
    system = config.system
    processes = start_processes(system.device, system.dtype, deterministic=system.deterministic)
    with restored_handlers(), setup(config, processes) as run:
        if idea is not None and run.state.step and (not is_done(run) or run.lacks_validation):
            raise ValueError(
                f"{run.directory.path} was stopped at step {run.state.step} before the last validation of this "
                "configuration, and checkpoints do not store what an idea keeps: delete it, to train it again"
            )
        changed = (idea or Idea)(run)
        if train(run, train_step=changed.train_step, validate=changed.validate) != "finished":
            raise KeyboardInterrupt


def train_to_end(arguments: list[str], idea: type[Idea] | None) -> tuple[float, list[dict]]:
    """Train a run as `finish` does. Return its last validation loss and its metrics.

    The loss is inf if the run diverged or the loss is not finite. With eval.final_tokens, it is the loss on that many
    tokens, otherwise the loss on eval.tokens. With eval.patience, it is always the loss on eval.tokens, so that all
    runs can be compared: a run that ends early has no loss on eval.final_tokens.
    """
    config, diverged = parse_config(arguments), False
    run, measured = config.run, "final_loss" if config.eval.final_tokens and not config.eval.patience else "loss"
    try:
        finish(arguments, idea)
    except FloatingPointError as error:
        print(f"{run.name}: {error}", file=sys.stderr)
        diverged = True
    records = read_metrics(Path(run.dir) / run.name / "metrics.jsonl")
    final = next((r.get(measured) for r in reversed(records) if r["split"] == "val"), None)
    return math.inf if diverged or final is None else final, records


def train_apart(arguments: list[str], idea: type[Idea] | None = None) -> float:
    """Train a run as `train_to_end` does, in a temporary directory, and return its last validation loss."""
    with tempfile.TemporaryDirectory() as directory:
        return train_to_end([*arguments, "--run.dir", directory], idea)[0]


def as_flags(fields: Iterable[str]) -> list[str]:
    """Return train.py's arguments for fields: ["optim.lr=1e-3"] gives ["--optim.lr", "1e-3"]."""
    return [part for name, _, value in (field.partition("=") for field in fields) for part in (f"--{name}", value)]


def first_below(records: list[dict], loss: float) -> int | None:
    """Return the training tokens at the first validation with at most this loss, or None without such a validation."""
    reached = (r["tokens"] for r in records if r["split"] == "val" and r["loss"] is not None and r["loss"] <= loss)
    return next(reached, None)


def lowest(records: list[dict]) -> tuple[float, str]:
    """Return the lowest validation loss of a run, and the step of this validation as text, such as " at 748"."""
    loss, step = min((r["loss"], r["step"]) for r in records if r["split"] == "val" and r["loss"] is not None)
    return loss, f" at {step:,}"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def table(args: argparse.Namespace) -> str:
    """Train the runs that have not finished yet, and return the table in Markdown."""
    choices = [  # split at commas outside brackets: betas=[0.9,0.95],[0.9,0.99] are two values
        [(name, value) for value in re.split(r",(?![^\[]*\])", values)]
        for name, _, values in (field.partition("=") for field in args.vary)
    ]
    rows = []
    for combination in itertools.product(*choices):
        finals, cells, seconds, reached = [], [], [], []
        for seed in args.seeds:
            fields = [*combination, ("run.seed", str(seed))]
            parts = [Path(args.config).stem, *([args.idea] if args.idea else [])]
            name = "-".join([*parts, *(f"{n.rpartition('.')[2]}_{v}" for n, v in fields)]).replace("/", "-")
            flags = [part for n, v in fields for part in (f"--{n}", v)]
            arguments = ["--config", args.config, "--run.dir", args.dir, "--run.name", name, *flags]
            final, records = train_to_end(arguments, args.idea and find_idea(args.idea))
            final, at = lowest(records) if args.best and final < math.inf else (final, "")
            finals.append(final)
            cells.append(f"{final:.4f}{at}")
            seconds.append(next(r["seconds"] for r in reversed(records) if r["split"] == "train"))
            reached.append([first_below(records, loss) for loss in args.losses])
        tokens = [
            "never" if None in counts else f"{statistics.median(counts):,.0f}" for counts in zip(*reached, strict=True)
        ]
        rows.append(
            [
                f"{statistics.median(finals):.4f}",
                (", " if args.best else " ").join(cells),
                *tokens,
                f"{statistics.median(seconds):.0f}",
                f"`{' '.join(f'{n}={v}' for n, v in combination)}`",
            ]
        )
    counted = [f"tokens to {loss}" for loss in args.losses]
    return markdown([f"{'best' if args.best else 'final'} loss", "each seed", *counted, "seconds", "varied"], rows)


def main() -> None:
    """Run the command line."""
    parser = CommandParser(prog="python -m scripts.sweep", description="Train one configuration in several ways.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of train.py")
    parser.add_argument("--vary", nargs="*", default=[], metavar="FIELD=V,V", help="values to try for a field")
    parser.add_argument(
        "--idea", metavar="NAME[+NAME]", help=f"train with changes of scripts/ideas.py: {', '.join(IDEAS)}"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1337], help="seeds of each combination (default: 1337)"
    )
    parser.add_argument(
        "--losses", nargs="*", type=float, default=[], help="validation losses for which to count the tokens needed"
    )
    parser.add_argument(
        "--best", action="store_true", help="compare each run's lowest validation loss instead of its last one"
    )
    parser.add_argument("--dir", default="runs/sweep", help="directory of the runs (default: %(default)s)")
    args = parser.parse_args()
    names = [field.partition("=")[0] for field in args.vary]
    for field, name in zip(args.vary, names, strict=True):
        if "=" not in field:
            parser.error(f"--vary {field}: expected FIELD=VALUE,VALUE")
        if name in OWN_FIELDS:
            parser.error(f"--vary {field}: the sweep sets {name} itself; {OWN_FIELDS[name]}")
        if names.count(name) > 1:
            parser.error(f"--vary has {name} twice: give all its values at once, {name}=VALUE,VALUE")
    then = "delete the run that was stopped, and repeat" if args.idea else "continue with"
    with ending(parser, interrupted=f"\n{parser.prog}: stopped; {then} the same command\n"):
        print(table(args))


if __name__ == "__main__":
    main()
