"""The questions of the HellaSwag benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks.workload import QUESTIONS
from eval.rows import read_rows


def hellaswag_rows() -> list[dict[str, Any]]:
    """Return QUESTIONS evenly spaced rows of HellaSwag's validation set."""
    rows = read_rows("hellaswag/none/validation")
    return rows[:: len(rows) // QUESTIONS][:QUESTIONS]
