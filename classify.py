r"""Fine-tune a GPT-2 to classify texts, and classify texts with it.

python classify.py train --model gpt2 --train reviews.csv --val held-out.csv --out runs/reviews
python classify.py pet --model gpt2 --train few.csv --unlabeled many.csv --val held-out.csv --out runs/reviews \
    --pattern "{text} It was {label}." --verbalizer good=positive --verbalizer bad=negative
python classify.py predict --model runs/reviews --file new.csv > classes.jsonl

The input files are .csv (with a header) or .jsonl. Their columns are "text" and "label", or those that --text-key and
--label-key name. With --strategy last, transformers can load the trained classifier as a GPT2ForSequenceClassification,
together with the names of the classes.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from command import CommandParser, add_device_options, add_model_options, at_least_one, ending


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|pet|predict")
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add_model_options(add, note="", required=True)
    add("--text-key", default="text", metavar="KEY", help="column with the texts (default: text)")
    add("--batch-size", type=int, default=16, metavar="N", help="texts in a batch (default: 16)")
    add("--max-length", type=int, metavar="N", help="read at most N tokens of each text (default: the model's limit)")
    add_device_options(add)
    training = argparse.ArgumentParser(add_help=False, parents=[shared])
    add = training.add_argument
    add("--val", type=Path, required=True, metavar="FILE", help="labeled texts; their loss decides which epoch is kept")
    add("--out", type=Path, required=True, metavar="DIR", help="directory to write the best classifier to")
    add("--label-key", default="label", metavar="KEY", help="column with the classes (default: label)")
    add(
        "--strategy",
        choices=("last", "all"),
        default="last",
        help="compute the class from the hidden state of the last token, or from those of all tokens (default: last)",
    )
    add("--epochs", type=int, default=3, metavar="N", help="largest number of epochs (default: 3)")
    add(
        "--patience",
        type=int,
        default=2,
        metavar="N",
        help="stop after N epochs without a lower validation loss (default: 2)",
    )
    add("--lr", type=float, default=2e-5, help="peak learning rate of AdamW (default: 2e-5)")
    add(
        "--freeze-layers",
        type=int,
        default=0,
        metavar="N",
        help="freeze the first N blocks and the embeddings (default: 0, none)",
    )
    add("--seed", type=int, default=1337, help="seed of the head's initial weights and of the order of the texts")
    train = commands.add_parser("train", parents=[training], help="fine-tune on texts with labels")
    train.add_argument("--train", type=Path, required=True, metavar="FILE", help="texts to train on")
    add_pet_arguments(
        commands.add_parser("pet", parents=[training], help="fine-tune on few texts with labels and many without")
    )
    predict = commands.add_parser(
        "predict", parents=[shared], help="print the class of each text as one JSON object per line"
    )
    predict.add_argument("--file", type=Path, required=True, metavar="FILE", help="texts to classify")
    args = parser.parse_args(arguments)
    counts = ("batch_size", "max_length", "epochs", "patience", "pattern_epochs", "models_per_pattern", "generations")
    at_least_one(parser, args, *counts)
    if args.command == "predict":
        return args
    for name in ("lr", "temperature"):
        if not 0 < (value := getattr(args, name, 1.0)) < math.inf:
            parser.error(f"--{name} must be above 0, got {value}")
    if not 0 <= (alpha := getattr(args, "alpha", 0.0)) < 1:
        parser.error(f"--alpha must be at least 0 and below 1, got {alpha}")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed must be in 0..2^64 - 1, got {args.seed}")
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists: choose another directory, or delete it")
    return args


def add_pet_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--train",
        type=Path,
        metavar="FILE",
        help="labeled texts (default: none; then the pretrained model labels the unlabeled texts)",
    )
    add("--unlabeled", type=Path, required=True, metavar="FILE", help="texts without labels")
    add(
        "--pattern",
        action="append",
        required=True,
        metavar="PATTERN",
        help="a text with the fields {text} and {label}; \\n is a line break. May be repeated",
    )
    add(
        "--verbalizer",
        action="append",
        required=True,
        metavar="WORD=CLASS",
        help="a word or phrase that replaces {label} for this class. Repeat the option: at least one word per class",
    )
    add("--alpha", type=float, default=1e-4, help="weight of the language-modeling loss (default: 1e-4)")
    add("--temperature", type=float, default=2.0, help="divides the scores that give the soft labels (default: 2)")
    add("--pattern-epochs", type=int, default=10, metavar="N", help="epochs to train a pattern's models (default: 10)")
    add("--models-per-pattern", type=int, default=3, metavar="N", help="models for each pattern (default: 3)")
    add("--generations", type=int, default=1, metavar="N", help="generations of models; above 1: iPET (default: 1)")


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="classify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args = parse_arguments(parser, arguments)
    with ending(parser, needs_reader=args.command == "predict"):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("classify.py runs in a single process: start it without torchrun")
        import pet  # imported after the arguments are checked: importing torch takes seconds

        pet.COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
