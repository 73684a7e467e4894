"""Train with each way of cutting text into windows, and score all models on the same held-out documents:

    python -m scripts.windows --config configs/shakespeare.yaml --held-out data/shakespeare --seeds 1 2 3 4 5

Other options are passed to train.py. The table has means and standard deviations of the loss over the seeds. Each model
is scored twice: once in windows of the held-out text, where a token also attends to earlier documents, and once with a
mask, so that a token attends only to its own document. Runs and scores that exist already are not repeated.
docs/data.md has the results.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.windows")

import argparse
import json
import statistics
from pathlib import Path

from command import CommandParser, ending
from data.shards import open_split
from eval.run import main as evaluate
from scripts.sweep import finish, markdown

# Way of cutting text into windows -> options of train.py.
WAYS = {
    "packed": [],
    "packed, shift": ["--data.shift", "true"],
    "aligned": ["--data.windows", "aligned"],
    "packed, mask": ["--data.document_mask", "true"],
    "aligned, mask": ["--data.windows", "aligned", "--data.document_mask", "true"],
}
# Heading of a column of the table -> options of eval.run.
SCORES = {"with context across borders": [], "each document by itself": ["--document-mask"]}


def score(run: Path, held_out: str, flags: list[str]) -> float:
    """Return the loss of a run on the validation split of a dataset, as `eval.run` measures it with these flags."""
    split = open_split(Path(held_out), "val")
    results = run / f"loss-{split.fingerprint[:12]}{''.join(flags)}.json"
    if not results.exists():
        files = ["--model", str(run), "--data", held_out, "--json", str(results)]
        evaluate([*files, "--tasks", "loss", "--dtype", "float32", *flags])
    return next(row["value"] for row in json.loads(results.read_text()) if row["metric"] == "loss")


def table(args: argparse.Namespace, flags: list[str]) -> str:
    """Train and score the runs that are missing, and return the table in Markdown. `flags` are options of train.py."""
    rows = []
    losses: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    # The seeds are the outer loop, so that an interrupted comparison has the runs of all ways for the first seeds.
    for seed in args.seeds:
        for way, settings in WAYS.items():
            run = Path(args.dir) / f"{way.replace(', ', '-')}-seed_{seed}"
            names = ["--run.dir", args.dir, "--run.name", run.name, "--run.seed", str(seed)]
            finish(["--config", args.config, *flags, *settings, *names], None)
            losses[way].append([score(run, args.held_out, options) for options in SCORES.values()])
    for way, found in losses.items():
        cells = (
            f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"
            for values in zip(*found, strict=True)
        )
        rows.append([way, *cells])
    return markdown(["windows", *SCORES], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m scripts.windows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file of train.py")
    add("--held-out", required=True, metavar="DIR", help="dataset to score, with the same tokenizer (validation split)")
    add("--seeds", nargs="+", type=int, default=[1337], help="seeds of each setting (default: 1337)")
    add("--dir", default="runs/windows", help="directory of the runs (default: %(default)s)")
    args, flags = parser.parse_known_args(arguments)
    with ending(parser, interrupted=f"\n{parser.prog}: stopped; continue with the same command\n"):
        print(table(args, flags))


if __name__ == "__main__":
    main()
