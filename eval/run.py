"""Evaluate a model, and print the results next to the published results of the released GPT-2 models.

python -m eval.run --model gpt2 --tasks hellaswag,lambada
python -m eval.run --model runs/mine --tasks hellaswag --convention harness --json results.json
python -m eval.run --model gpt2 --tasks perplexity --text book.txt --stride 256
python -m eval.run --model gpt2 --tasks loss --data data/mine --save-reference
python -m eval.run --tasks classify --file reviews.csv --template "{text}\\nSentiment:" --labels 0=bad,1=good

Under torchrun, the processes divide the work. With --json, an interrupted evaluation continues where it stopped.
"""

from __future__ import annotations

if not __package__:  # started as `python eval/run.py`: the imports below would fail
    raise SystemExit("Run this in the root of the repository: python -m eval.run")

import argparse
from collections.abc import Sequence
from pathlib import Path

from command import CommandParser, add_device_options, add_model_options, at_least_one, ending
from data.plain_text import read_escapes

TASK_HELP = """tasks:
  hellaswag                     --convention completion (default) or harness
  arc_easy arc_challenge boolq commonsense_qa copa openbookqa piqa rte sciq social_iqa sst2 winogrande
  cbt-cn cbt-ne                 Children's Book Test, validation split as in the GPT-2 paper; from the hub
  lambada lambada_openai        last words of passages; lambada_openai is OpenAI's file, from the hub
  perplexity                    of a text (--text FILE) or of a validation split (--data DIR)
  wikitext-2 wikitext-103 ptb enwik8 text8 1bw
                                perplexity as in the GPT-2 paper; from the hub, or from --text FILE
  wikitext-2-raw                the same without detokenization, as in Hugging Face's guide
  classify                      rows of --file, with --template and --labels
  loss                          loss as in training, on the validation split of --data DIR
"""

CORPORA = ("wikitext-2", "wikitext-2-raw", "wikitext-103", "ptb", "enwik8", "text8", "1bw")  # of eval/perplexity.py
OPTIONS_OF_TASKS = {  # for each of these options, the only tasks that read it
    "text": ("perplexity", *CORPORA),
    "stride": ("perplexity", *CORPORA),
    "data": ("perplexity", "loss"),
    "tokens": ("perplexity", "loss"),
    "document_mask": ("loss",),
    "file": ("classify",),
    "train_file": ("classify",),
    "template": ("classify",),
    "labels": ("classify",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add_model_options(add, "; other architectures are also supported (default: the newest run)")
    add("--tasks", required=True, metavar="A,B,C", help="tasks to evaluate; see the list below")
    add(
        "--convention",
        choices=("completion", "harness"),
        help="how multiple-choice tasks are encoded and normalized (default: depends on the task)",
    )
    add("--shots", type=int, default=0, metavar="K", help="solved examples before each question (default: 0)")
    add(
        "--shots-from",
        choices=("train", "evaluated"),
        default="train",
        help="source of the solved examples: the train split, or the evaluated rows except the question itself",
    )
    add("--seed", type=int, default=0, help="seed for drawing the solved examples (default: 0)")
    add("--limit", type=int, metavar="N", help="evaluate only the first N examples, or windows of a text, of each task")
    add_device_options(add, ". The weights stay float32")
    add("--batch-size", type=int, metavar="B", help="sequences per forward pass (default: 8 on CPU, 64 elsewhere)")
    add("--transformers", action="store_true", help="load every model with transformers, GPT-2 models too")
    add("--json", type=Path, metavar="FILE", help="write the results to this file")
    add("--examples", type=Path, metavar="FILE", help="write one line of JSON per example to this file")
    texts = parser.add_argument_group("perplexity and loss")
    texts.add_argument("--text", type=Path, metavar="FILE", help="text file to score")
    texts.add_argument("--data", type=Path, metavar="DIR", help="dataset made by data.prepare")
    texts.add_argument(
        "--stride", type=int, metavar="N", help="new tokens per window (default: half of the model's block size)"
    )
    texts.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="score this many tokens of the validation split of --data (default: 10485760, as in training)",
    )
    texts.add_argument(
        "--document-mask", action="store_true", help="for --tasks loss: each token attends to its own document only"
    )
    texts.add_argument(
        "--save-reference",
        action="store_true",
        help="store loss and bits per byte in the dataset; the loss plots of runs then show this loss as a line",
    )
    table = parser.add_argument_group("classify")
    table.add_argument("--file", type=Path, metavar="FILE", help="table to classify: .csv with a header, or .jsonl")
    table.add_argument("--train-file", type=Path, metavar="FILE", help="table with the solved examples for --shots")
    table.add_argument("--template", type=read_escapes, help=r"context with field names in braces; \n is a line break")
    table.add_argument(
        "--label-field", default="label", metavar="NAME", help="field that holds the correct label (default: label)"
    )
    table.add_argument("--labels", metavar="V=WORD,...", help="for each label V, the word that the model scores")


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Invalid combinations of options end the process with status 2."""
    args = parser.parse_args(arguments)
    args.tasks = [name for name in args.tasks.split(",") if name]
    at_least_one(parser, args, "limit", "batch_size", "stride", "tokens")
    if args.shots < 0:
        parser.error(f"--shots must not be negative, got {args.shots}")
    if args.text and args.data and "perplexity" in args.tasks:
        parser.error("--tasks perplexity takes --text or --data, not both")
    needed = {"perplexity": ("text", "data"), "loss": ("data",), "classify": ("file",)}
    for task, options in needed.items():
        if task in args.tasks and not any(getattr(args, option) for option in options):
            parser.error(f"--tasks {task} needs {' or '.join('--' + option for option in options)}")
    if "classify" in args.tasks and not (args.template and args.labels):
        parser.error("--tasks classify needs --template and --labels")
    for name, tasks in OPTIONS_OF_TASKS.items():
        if getattr(args, name) and not set(tasks) & set(args.tasks):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} is read only by --tasks {', '.join(tasks)}: add such a task, or omit {option}")
    if args.tokens and not args.data:
        parser.error("--tokens counts tokens of --data: omit it, or use --limit for the windows of --text")
    if args.save_reference and "loss" not in args.tasks:
        parser.error("--save-reference stores the result of --tasks loss: add loss to --tasks")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    parser = CommandParser(
        prog="python -m eval.run",
        description=__doc__,
        epilog=TASK_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parse_arguments(parser, arguments)
    with ending(parser):
        from eval.evaluate import evaluate  # imported here: arguments are checked before torch is imported

        evaluate(args)


if __name__ == "__main__":
    main()
