"""Compare zero-shot classification, a fine-tuned classifier and pattern-exploiting training on few labeled texts:

    python -m scripts.few_labels --model runs/english --sizes 32 100 --seeds 1 2 3 4 5

The texts are the 872 of SST-2's validation split. Each seed orders them differently: the first 400 are the test texts,
the next ones are the labeled texts (as many as --sizes says), and the last 372 are used without their labels. The
labeled texts are also the validation texts that select the best epoch. docs/recipes.md has the results.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.few_labels")

import argparse
import csv
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from classification import encode, evaluate
from classify import main as classify
from cloze import make_clozes, read_verbalizer, score_all
from command import CommandParser, at_least_one, ending
from data.loader import permute
from data.tokenizer import load_tokenizer
from eval.rows import read_rows
from heads import SequenceClassifier
from pet import soft_labels
from pretrained import load_model

PATTERNS = ["{text} All in all, it was {label}.", "It was {label}. {text}", "Just {label}! {text}"]
WORDS = ["good=positive", "bad=negative"]
N_TEST, N_UNLABELED = 400, 372
LENGTH = 96  # largest number of tokens of a text; longer texts are cut

Row = tuple[str, str]  # a text and its class


def read_sst2() -> list[Row]:
    """Return sentences from film reviews and their classes (Socher et al. 2013)."""
    rows = read_rows("glue/sst2/validation")
    return [(row["sentence"].strip(), ("negative", "positive")[row["label"]]) for row in rows]


def split_rows(rows: Sequence[Row], seed: int, n_labeled: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the test texts, the labeled texts and the texts whose labels are not used."""
    order = permute(np.arange(len(rows)), len(rows), seed, 0)
    shuffled = [rows[i] for i in order]
    return shuffled[:N_TEST], shuffled[N_TEST : N_TEST + n_labeled], shuffled[-N_UNLABELED:]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def zero_shot(model_name: str, test: Sequence[Row]) -> float:
    """Return the accuracy of the language model on the test texts without fine-tuning.

    The model scores the words of WORDS in each pattern of PATTERNS.
    """
    model, tokenizer, _ = load_model(model_name)
    verbalizer = read_verbalizer(WORDS)
    texts = [text for text, _ in test]
    clozes = [make_clozes(texts, pattern, verbalizer.words, tokenizer, LENGTH) for pattern in PATTERNS]
    scores = [score_all(model, part, verbalizer, 32, torch.float32) for part in clozes]
    chosen = soft_labels(scores, [1.0] * len(scores), 1.0).argmax(dim=-1).tolist()
    return statistics.mean(verbalizer.classes[i] == label for i, (_, label) in zip(chosen, test, strict=True))


def fine_tune(command: str, model_name: str, directory: Path, seed: int, flags: Sequence[str]) -> Path:
    """Run `classify.py train` or `classify.py pet` on the labeled texts in `directory`.

    `command` is train or pet, and `flags` are further options. Return the directory of the resulting classifier.
    """
    out = directory / command
    few = str(directory / "few.csv")
    given = ["--model", model_name, "--train", few, "--val", few, "--out", str(out), "--seed", str(seed)]
    fixed = f"--max-length {LENGTH} --dtype float32 --device cpu --patience 100"
    classify([command, *given, *fixed.split(), *flags])
    return out


def accuracy(directory: Path, test: Sequence[Row]) -> float:
    """Return the accuracy of a classifier on the test texts."""
    classifier = SequenceClassifier.from_pretrained(directory)
    labels = [classifier.labels.index(label) for _, label in test]
    examples = encode([text for text, _ in test], labels, load_tokenizer(directory), LENGTH)
    return evaluate(classifier, examples, 32, torch.float32).accuracy


def run(args: argparse.Namespace) -> None:
    """Print the accuracy of each method for each number of labeled texts and each seed, and means over the seeds."""
    results: dict[tuple[str, int], list[float]] = {}
    lr = ["--lr", str(args.lr)]
    rows = read_sst2()
    pet = [flag for pattern in PATTERNS for flag in ("--pattern", pattern)]
    pet += [flag for word in WORDS for flag in ("--verbalizer", word)]
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
                found = {"zero-shot": zero_shot(args.model, test), "classifier": accuracy(plain, test)}
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
    parser = CommandParser(
        prog="python -m scripts.few_labels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="directory of a run, or another model")
    add("--sizes", type=int, nargs="+", default=[32, 100], metavar="N", help="labeled texts to use (default: 32 100)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="S", help="random seeds (default: 1 2 3 4 5)")
    add("--lr", type=float, default=1e-3, help="learning rate of all fine-tuning (default: 1e-3)")
    add("--epochs", type=int, default=10, metavar="N", help="epochs over the labeled texts (default: 10)")
    add("--final-epochs", type=int, default=5, metavar="N", help="epochs of the last step of pet (default: 5)")
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
