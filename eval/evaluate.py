"""Run the tasks of `eval.run` on a model, print a table of the results, and write them as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.evaluator import Evaluator, ScoreCache, join_processes, load_model_and_tokenizer, model_fingerprint
from eval.reference import REFERENCE_FILE, published
from eval.tasks import TaskResult, find_tasks, is_multiple_choice
from files import PARTIAL_SUFFIX, check_writable
from model import PRESETS
from pretrained import resolve_model
from weights import locate


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate a model, print the results and write the requested files. `args` are the parsed arguments of `eval.run`.

    Raises ValueError or OSError for invalid arguments.
    """
    tasks = find_tasks(args.tasks)
    if args.shots and (others := [name for name in tasks if not is_multiple_choice(name)]):
        raise ValueError(f"--shots applies to multiple-choice tasks only, not to {', '.join(others)}")
    outputs = output_files(args)
    for path in outputs:
        check_writable(path)
    with join_processes(args.device, args.dtype) as processes:
        # Each process finds the model, and prints an error about a wrong name. All use the one that the main process
        # found, because a run that is still training may have saved another checkpoint meanwhile.
        name = processes.broadcast(resolve_model(args.model, checkpoint=args.checkpoint))
        directory = locate(name)
        model, tokenizer = load_model_and_tokenizer(
            name, directory, processes.device, through_transformers=args.transformers
        )
        batch_size = args.batch_size or (8 if processes.device.type == "cpu" else 64)
        partial = None if args.json is None else args.json.with_name(args.json.name + PARTIAL_SUFFIX)
        identity = f"{model_fingerprint(directory, outputs)} {processes.dtype} {batch_size} {args.transformers}"
        show_progress = processes.is_main and sys.stderr.isatty()
        evaluator = Evaluator(
            name, model, tokenizer, processes, batch_size, ScoreCache(partial, identity), show_progress
        )
        rows: list[dict[str, Any]] = []
        examples: list[dict[str, Any]] = []
        for task, function in tasks.items():
            try:
                result = function(args, evaluator)
            except ValueError as error:
                raise ValueError(f"{task}: {error}") from error
            rows += result_rows(task, result, name)
            heading = {"task": task, "convention": result.convention}
            examples += [heading | {"index": i} | example for i, example in enumerate(result.examples)]
        if not processes.is_main:
            return
        # First the results, which are worth most. The stored scores are deleted last, because they are needed again if
        # a file cannot be written.
        if args.json is not None:
            args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(format_table(rows))
        if args.examples is not None:
            args.examples.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
        if partial is not None:
            partial.unlink(missing_ok=True)


def output_files(args: argparse.Namespace) -> list[Path]:
    """Return the files that an evaluation with these arguments writes, including those that exist only for a time."""
    replaced = [args.json] if args.json is not None else []
    if args.save_reference:
        replaced.append(args.data / REFERENCE_FILE)
    partial = [Path(f"{path}{PARTIAL_SUFFIX}") for path in replaced]
    return [*replaced, *partial, *([args.examples] if args.examples is not None else [])]


def result_rows(task: str, result: TaskResult, checkpoint: str) -> list[dict[str, Any]]:
    """Return the entries of the JSON file for a task: one for each metric, with its published values.

    `checkpoint` is the directory or hub name of the evaluated model.
    """
    return [
        {
            "task": task,
            "convention": result.convention,
            "metric": metric,
            "value": value,
            "stderr": stderr,
            "count": result.count,
            "checkpoint": checkpoint,
            "published": published(task, result.convention, metric),
        }
        for metric, (value, stderr) in result.metrics.items()
    ]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format results as an aligned table. On the right, a column for each released model has its published values."""
    cells = [["task", "convention", "metric", "value", "± stderr", "count", *PRESETS]]
    for row in rows:
        known = [f"{row['published'][name]:.4g}" if name in row["published"] else "" for name in PRESETS]
        stderr = _format_number(row["stderr"]) if row["stderr"] else ""
        value = _format_number(row["value"])
        cells.append([row["task"], row["convention"], row["metric"], value, stderr, f"{row['count']:,}", *known])
    columns = []
    for i, column in enumerate(zip(*cells, strict=True)):
        if any(column[1:]):  # a column without an entry is left out
            width = max(map(len, column))
            columns.append([cell.ljust(width) if i < 3 else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _format_number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"
