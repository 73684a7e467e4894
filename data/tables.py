"""Read tables from JSON Lines and CSV files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data.plain_text import read_utf8

# The default limit of the csv module, 131,072 characters in a field, is too low for a long document. 2^31 - 1 is the
# largest value that fits a C long on every platform.
csv.field_size_limit(2**31 - 1)


def parse_json_object(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object in `line`. Raises ValueError if there is none; the message begins with `where`."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply; repair or remove the line") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); repair or remove the line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: found a {type(row).__name__}, expected a JSON object")
    return row


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Iterate over the lines that are not blank: (line number from 1, JSON object).

    Raises OSError when the file cannot be read, ValueError naming the file and the line when a line is not a JSON
    object or not UTF-8.
    """
    # Only \n ends a line: JSON allows other line separators of Unicode inside a string.
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            yield number, parse_json_object(line, f"{path}, line {number}")


def parse_csv(lines: Iterable[str], name: str) -> Iterator[list[str]]:
    """Iterate over the rows of a CSV file: the header comes first, and blank rows are skipped.

    `lines` are the lines of the file, with their line ends. Raises ValueError, naming the file, when the quotes of a
    row do not match, when a row has more or fewer fields than the header, or when two columns have the same name.
    """
    header: list[str] = []
    number = 0
    rows = csv.reader(lines, strict=True)  # without `strict`, a missing quote makes the rest of the file one field
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(
                f"{name}, row {number + bool(header)} cannot be read: {error}. Close its quotes, double those inside a "
                "field, and give longer texts as .jsonl"
            ) from None
        if row is None:
            return
        if not row:
            continue
        if not header:
            header = row
            if twice := next((column for column in row if row.count(column) > 1), None):
                raise ValueError(f"{name} has two columns named {twice!r}: rename one")
        else:
            number += 1
            if len(row) != len(header):
                fields = f"{len(row)} field{'s' if len(row) > 1 else ''}"
                raise ValueError(
                    f"{name}, row {number} has {fields}, the header has {len(header)}: quote the text "
                    '("...") where it contains a comma'
                )
        yield row


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Iterate over the rows of a CSV file with a header: (row number from 1, fields by column name).

    Raises OSError when the file cannot be read, ValueError as `parse_csv` does.
    """
    rows = parse_csv(io.StringIO(read_utf8(path), newline=""), str(path))
    header = next(rows, [])
    for number, row in enumerate(rows, 1):
        yield number, dict(zip(header, row, strict=True))


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a .csv file with a header, or of a .jsonl file.

    Raises OSError when the file cannot be read, ValueError for another type of file, for a file without rows, or for
    a row that cannot be read.
    """
    path = Path(path)
    readers = {".csv": read_csv, ".jsonl": read_json_lines}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} has an unknown type: expected .csv or .jsonl")
    rows = [row for _, row in readers[path.suffix.lower()](path)]
    if not rows:
        raise ValueError(f"{path} is empty: expected at least one row")
    return rows
