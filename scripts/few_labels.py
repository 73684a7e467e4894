"""Compare zero-shot classification, a fine-tuned classifier and pattern-exploiting training on few labeled texts:

    python -m scripts.few_labels --model runs/english --task sst2 --sizes 32 100 --seeds 1 2 3 4 5

The texts are 872 of the pinned package: SST-2's validation split, or 218 questions about each of four subjects. Each
seed orders them differently: 400 are the test texts, the next ones are labeled, and the last 372 are used without
labels. The labeled texts also select the epoch, so that no method sees more labels than their number. docs/recipes.md
has the results.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from classification import encode, evaluate
from classify import main as classify
from cloze import make_clozes, read_verbalizer, score_all
from command import at_least_one, ending
from data.loader import permute
from data.tokenizer import load_tokenizer
from eval.rows import read_rows
from heads import SequenceClassifier
from pet import soft_labels
from pretrained import load_model

N_TEST, N_UNLABELED = 400, 372
N_EACH = 218  # questions about each subject
LENGTH = 96  # tokens read of each text

Row = tuple[str, str]  # a text and its class


class Task(NamedTuple):
    """A classification task: its texts, and how classify.py pet describes it."""

    read: Callable[[], list[Row]]
    patterns: list[str]
    words: list[str]


def read_sst2() -> list[Row]:
    """Return sentences from film reviews (Socher et al. 2013)."""
    rows = read_rows("glue/sst2/validation")
    return [(row["sentence"].strip(), ("negative", "positive")[row["label"]]) for row in rows]


def read_subjects() -> list[Row]:
    """Return questions from MMLU (Hendrycks et al. 2021), without their choices, and their subjects."""
    parts = ("elementary_mathematics", "high_school_macroeconomics", "nutrition", "philosophy")
    rows = {part: read_rows(f"hails/mmlu_no_train/{part}/test")[:N_EACH] for part in parts}
    return [(row["question"].strip(), part.rpartition("_")[2]) for part in parts for row in rows[part]]


TASKS = {
    "sst2": Task(
        read_sst2,
        ["{text} All in all, it was {label}.", "It was {label}. {text}", "Just {label}! {text}"],
        ["good=positive", "bad=negative"],
    ),
    "subjects": Task(
        read_subjects,
        ["{text} This is about {label}.", "A question about {label}: {text}", "{label}: {text}"],
        ["number=mathematics", "money=macroeconomics", "food=nutrition", "truth=philosophy"],
    ),
}


def split_rows(rows: Sequence[Row], seed: int, n_labeled: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the test texts, the labeled texts and the texts whose labels are not used."""
    order = permute(torch.arange(len(rows)).numpy(), len(rows), seed, 0)
    shuffled = [rows[i] for i in order]
    return shuffled[:N_TEST], shuffled[N_TEST : N_TEST + n_labeled], shuffled[-N_UNLABELED:]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def zero_shot(model_name: str, task: Task, test: Sequence[Row]) -> float:
    """Return the accuracy of the untrained model with all patterns, which weigh the same."""
    model, tokenizer, _ = load_model(model_name)
    verbalizer = read_verbalizer(task.words)
    texts = [text for text, _ in test]
    clozes = [make_clozes(texts, pattern, verbalizer.words, tokenizer, LENGTH) for pattern in task.patterns]
    scores = [score_all(model, part, verbalizer, 32, torch.float32) for part in clozes]
    chosen = soft_labels(scores, [1.0] * len(scores), 1.0).argmax(dim=-1).tolist()
    return statistics.mean(verbalizer.classes[i] == label for i, (_, label) in zip(chosen, test, strict=True))


def fine_tune(command: str, model_name: str, directory: Path, seed: int, flags: Sequence[str]) -> Path:
    """Run `classify.py train` or `classify.py pet`, and return the directory of its result."""
    out = directory / f"{command}-{time.monotonic_ns()}"
    given = f"--model {model_name} --train {directory}/few.csv --val {directory}/few.csv --out {out} --seed {seed}"
    fixed = f"--max-length {LENGTH} --dtype float32 --device cpu --patience 100"
    classify([command, *given.split(), *fixed.split(), *flags])
    return out


def accuracy(directory: Path, test: Sequence[Row]) -> float:
    """Return the accuracy of a classifier on the test texts."""
    classifier = SequenceClassifier.from_pretrained(directory)
    labels = [classifier.labels.index(label) for _, label in test]
    examples = encode([text for text, _ in test], labels, load_tokenizer(directory), LENGTH)
    return evaluate(classifier, examples, 32, torch.float32).accuracy


def run(args: argparse.Namespace) -> None:
    """Print the accuracy of each method for each number of labeled texts and each seed, then means and deviations."""
    results: dict[tuple[str, int], list[float]] = {}
    lr = ["--lr", str(args.lr)]
    task = TASKS[args.task]
    rows = task.read()
    pet = [flag for pattern in task.patterns for flag in ("--pattern", pattern)]
    pet += [flag for word in task.words for flag in ("--verbalizer", word)]
    pet += ["--models-per-pattern", str(args.models_per_pattern), "--generations", str(args.generations)]
    pet += ["--pattern-epochs", str(args.epochs), "--epochs", str(args.final_epochs)]
    for size in args.sizes:
        for seed in args.seeds:
            test, labeled, unlabeled = split_rows(rows, seed, size)
            with tempfile.TemporaryDirectory() as temporary:
                directory = Path(temporary)
                write_csv(directory / "few.csv", labeled)
                write_csv(directory / "many.csv", unlabeled)
                train_flags = [*lr, "--epochs", str(args.epochs)]
                plain = fine_tune("train", args.model, directory, seed, train_flags)
                found = {"zero-shot": zero_shot(args.model, task, test), "classifier": accuracy(plain, test)}
                pet_flags = [*lr, *pet, "--unlabeled", str(directory / "many.csv")]
                found["PET"] = accuracy(fine_tune("pet", args.model, directory, seed, pet_flags), test)
            for method, value in found.items():
                results.setdefault((method, size), []).append(value)
            shown = ", ".join(f"{method} {value:.4f}" for method, value in found.items())
            print(f"RESULT {size} labeled texts, seed {seed}: {shown}", flush=True)
    for (method, size), values in results.items():
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{method}, {size} labeled texts: mean {statistics.mean(values):.4f}, standard deviation {deviation:.4f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.few_labels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a run, or another model")
    add("--task", choices=TASKS, default="sst2", help="the texts to classify (default: sst2)")
    add("--sizes", type=int, nargs="+", default=[32, 100], metavar="N", help="labeled texts (default: 32 100)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="S", help="(default: 1 2 3 4 5)")
    add("--lr", type=float, default=1e-3, help="learning rate of all fine-tuning (default: 1e-3)")
    add("--epochs", type=int, default=10, metavar="N", help="epochs over the labeled texts (default: 10)")
    add("--final-epochs", type=int, default=5, metavar="N", help="epochs of PET's last step (default: 5)")
    add("--models-per-pattern", type=int, default=1, metavar="N", help="as for classify.py (default: 1)")
    add("--generations", type=int, default=1, metavar="N", help="as for classify.py (default: 1)")
    args = parser.parse_args(arguments)
    at_least_one(parser, args, "epochs", "final_epochs", "models_per_pattern", "generations")
    if not all(0 < size <= 100 for size in args.sizes):
        parser.error(f"--sizes must be from 1 to 100, got {args.sizes}")
    with ending(parser):
        run(args)


if __name__ == "__main__":
    main()
