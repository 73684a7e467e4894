"""Read the files of a run, and the results that eval.run wrote to the same directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints import list_checkpoints
from data.shards import read_meta
from data.tokenizer import load_tokenizer
from eval.reference import losses_to_beat, published, published_losses
from files import file_sha256
from training.run_directory import RunDirectory, read_file

TRAIN_FIELDS = ("loss", "lr", "grad_norm", "tokens_per_second", "loss_scale")


class ValidationSet(NamedTuple):
    """The data that a validation loss was measured on. Losses on different validation sets cannot be compared."""

    # The sha256 of each validation shard (of all datasets of a mixture), or of val.jsonl for completions. If the sha256
    # is unknown: the path of the dataset.
    data: str
    tokens: int  # number of scored tokens; 0 if data.format is completions, where the whole file is scored
    sequence_length: int
    tokenizer: str  # kind of the tokenizer, or "" if unknown

    def __str__(self) -> str:
        if not self.tokens:
            return f"completions in at most {self.sequence_length} tokens"
        return f"{self.tokens:,} tokens in windows of {self.sequence_length}"


@dataclass
class RunLog:
    """The contents of a run's directory.

    Attributes:
        status: the result of `RunDirectory.read_status`, such as "finished".
        splits: the columns of metrics.jsonl by split and name, (n,) each, with NaN for missing values.
        convention: how HellaSwag was scored (see Convention in eval/choices.py), or "" if it was not scored.
        source: where the text of the dataset comes from, or the name of its directory if no file says it. For a
            mixture, the sources of all datasets.
        reference_losses: (model, nats per token) of other models on the same validation set.
        evaluations: results in the format of eval.run, some with the "checkpoint" that was evaluated.
        samples: ("step 500", texts) in the order of writing.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    provenance: list[dict[str, Any]]
    status: str
    splits: dict[str, dict[str, np.ndarray]]
    convention: str
    source: str
    validation: ValidationSet
    reference_losses: list[tuple[str, float]]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[str, list[str]]] = field(default_factory=list)

    def seconds(self, steps: np.ndarray) -> np.ndarray:
        """Return the training time in seconds up to each step, without validation and checkpoints. (n,) -> (n,)

        The time is interpolated between the logged steps. All values are NaN if no training step has been logged.
        """
        train = self.splits["train"]
        if not len(train["step"]):
            return np.full(len(steps), np.nan)
        return np.interp(steps, np.append(0, train["step"]), np.append(0.0, train["seconds"]))


def read_run_log(directory: Path, name: str) -> RunLog:
    """Read the files that train.py and `eval.run --json` wrote to a run's directory.

    Raises FileNotFoundError if the directory has no metrics.jsonl, ValueError if metrics.jsonl has no complete record
    or a file is damaged.
    """
    run = RunDirectory(directory)
    path = run.metrics_path
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a run: it has no metrics.jsonl. Give a directory made by train.py")
    records = run.read_metrics()
    if not records:
        raise ValueError(f"{path} has no complete record yet: wait until the run has finished a step")
    splits = {
        "train": _columns(records, "train", ("step", "tokens", "seconds", *TRAIN_FIELDS)),
        "val": _columns(records, "val", ("step", "tokens", "loss", "bits_per_byte", "final_loss", "final_tokens")),
        "hellaswag": _columns(records, "hellaswag", ("step", "tokens", "acc", "acc_norm", "count")),
    }
    conventions = [record["convention"] for record in records if record["split"] == "hellaswag"]
    config = run.read_config()
    source, validation, reference_losses = _read_validation_set(config, directory)
    log = RunLog(
        name=name,
        directory=directory,
        config=config,
        provenance=run.read_provenance(),
        status=run.read_status(),
        splits=splits,
        convention=conventions[-1] if conventions else "",
        source=source,
        validation=validation,
        reference_losses=reference_losses,
        samples=list(run.iterate_samples()),
    )
    log.evaluations = list(_evaluations(log))
    return log


def _columns(records: Sequence[dict[str, Any]], split: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    rows = [record for record in records if record["split"] == split]
    return {name: np.array([row.get(name) for row in rows], np.float64) for name in names}


def dataset_directories(config: dict[str, Any]) -> list[str]:
    """Return the directories of a run's datasets: several for a mixture, otherwise data.dir, or "" if it is unknown."""
    data = config.get("data", {})
    return [part["dir"] for part in data.get("mixture") or []] or [data.get("dir", "")]


def _read_validation_set(config: dict[str, Any], run: Path) -> tuple[str, ValidationSet, list[tuple[str, float]]]:
    """Return the source of the dataset, the validation set, and the losses of other models on it.

    The files of a run do not describe its validation set, so this function reads the datasets themselves.
    """
    data, names = config.get("data", {}), dataset_directories(config)
    if data.get("format") == "completions":
        directory, checkpoints = Path(names[0]), list_checkpoints(RunDirectory(run).checkpoints)
        file = directory / "val.jsonl"
        texts = file_sha256(file) if file.is_file() else str(directory)
        kind = load_tokenizer(checkpoints[-1]).kind if checkpoints else ""
        return directory.name, ValidationSet(texts, 0, data.get("sequence_length", 0), kind), []
    sources, sets = zip(*(_read_dataset(name, config) for name in names), strict=True)
    source = "; ".join(sources)
    # The parts of a mixture are sorted, because the loss on all of them does not depend on their order.
    texts, tokens = " ".join(sorted(part.data for part in sets)), sum(part.tokens for part in sets)
    validation = sets[0]._replace(data=texts, tokens=tokens)
    if data.get("mixture"):  # no loss of another model was measured on a mixture
        return source, validation, []
    losses = losses_to_beat(names[0], source, validation.tokenizer) if data else []
    released = published_losses(source) if validation.tokenizer == "gpt2" else {}
    known = {name.removesuffix(", published") for name, _ in losses}
    losses += [(f"{name}, published", loss) for name, loss in released.items() if name not in known]
    return source, validation, losses


def _read_dataset(name: str, config: dict[str, Any]) -> tuple[str, ValidationSet]:
    """Return the source of the token shards in the directory `name`, and their validation set."""
    directory, limit = Path(name), config.get("eval", {}).get("tokens", 0)
    length = config.get("data", {}).get("sequence_length", 0)
    meta = read_meta(directory) if name and directory.is_dir() else None
    if meta is None:
        # Shards without meta.json have GPT-2 tokens. If the dataset is gone, its tokenizer is unknown.
        kind = "gpt2" if directory.is_dir() else ""
        return directory.name, ValidationSet(str(directory), limit, length, kind)
    shards = " ".join(shard.sha256 for shard in meta.shards["val"])
    tokens = min(limit, max(0, meta.tokens["val"] - 1))  # the first token of a split is never scored
    return meta.source, ValidationSet(shards, tokens, length, meta.tokenizer)


def _evaluations(log: RunLog) -> Iterator[dict[str, Any]]:
    """Yield the results of a run as rows in the format of eval.run.

    First come the last validation and the last HellaSwag result in metrics.jsonl, then the results in the JSON files
    that eval.run wrote, the oldest file first.
    """
    val, hellaswag = log.splits["val"], log.splits["hellaswag"]
    if len(val["step"]):
        released = {name.removesuffix(", published"): loss for name, loss in log.reference_losses}
        losses = {log.validation: val["loss"][-1]}
        if np.isfinite(val["final_loss"][-1]):  # the same loss again if the split has at most eval.tokens tokens
            losses[log.validation._replace(tokens=int(val["final_tokens"][-1]))] = val["final_loss"][-1]
        for validation, loss in losses.items():
            row = {"task": "validation", "convention": f"{log.source}, {validation}", "metric": "loss", "value": loss}
            yield row | {"checkpoint": f"step {int(val['step'][-1])}", "published": released}
    for metric in ("acc", "acc_norm") if len(hellaswag["step"]) else ():
        row = {"task": "hellaswag", "convention": log.convention, "metric": metric, "value": hellaswag[metric][-1]}
        row["published"] = published("hellaswag", log.convention, metric)
        yield row | {"checkpoint": f"step {int(hellaswag['step'][-1])}", "count": hellaswag["count"][-1]}
    for path in sorted(log.directory.glob("*.json"), key=lambda path: path.stat().st_mtime):
        rows = read_file(path, json.loads, None)
        if isinstance(rows, list):
            yield from (row for row in rows if isinstance(row, dict) and {"task", "metric", "value"} <= row.keys())
