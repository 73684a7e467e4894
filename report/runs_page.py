"""The page about training runs. `page_values` fills its template, also for the live page of report/live.py."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from report.charts import SIZES, Chart, Series, by_validation_set, draw_chart, make_charts
from report.page import pack, plotly_script, write_page
from report.run_log import RunLog, read_run_log
from report.tables import differences, evaluation_table, loss_thresholds, reached, summary

# Kind of a series -> the text that a tooltip shows after the name of the run.
TOOLTIP_SUFFIXES = {"step": ", each step", "mean": ", running mean", "validation": ", validation", "value": ""}


def write_runs_page(directories: Sequence[Path], out: Path, links: Sequence[str] = ()) -> None:
    """Read the runs, write the page to `out` and the PNG of each chart next to it.

    links: the names, without .html, of pages in the same directory that this page links to.

    Raises FileNotFoundError and ValueError as `read_run_log` does, OSError if a file cannot be written.
    """
    logs = read_logs(directories)
    charts = make_charts(logs)
    write_page(out, "runs.html", links=links, live=False, plotly=plotly_script(), **page_values(logs, charts))
    for chart in charts:
        draw_chart(chart, [log.name for log in logs], out.with_name(f"{out.stem}-{chart.key}.png"))
    print(f"{out.with_name(out.stem)}-*.png  ({len(charts)} charts)")


def read_logs(directories: Sequence[Path]) -> list[RunLog]:
    """Read the runs. If several runs have the same name, each is named by the path of its directory."""
    names = [directory.resolve().name for directory in directories]
    return [
        read_run_log(directory, str(directory) if names.count(name) > 1 else name)
        for directory, name in zip(directories, names, strict=True)
    ]


def page_values(logs: Sequence[RunLog], charts: Sequence[Chart]) -> dict[str, Any]:
    """Return the values with which the template runs.html is filled."""
    groups = by_validation_set(logs)
    evaluations = evaluation_table(logs)
    known = [any(row["published"][i] for row in evaluations) for i in range(len(SIZES))]
    return {
        "title": f"Training run: {logs[0].name}" if len(logs) == 1 else f"{len(logs)} training runs",
        "data": {"runs": [html.escape(log.name) for log in logs], "charts": [chart_data(chart) for chart in charts]},
        "runs": logs,
        "summaries": [summary(log) for log in logs],
        "groups": groups,
        "charts": charts,
        "measured_hellaswag": any(log.convention for log in logs),
        "progress": progress_tables(logs, groups),
        "evaluations": evaluations,
        "sizes": [(i, size) for i, size in enumerate(SIZES.values()) if known[i]],  # models with a published result
        "differences": differences(logs),
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
    }


def progress_tables(logs: Sequence[RunLog], groups: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return a table for each validation set: after how many tokens and how much training time a run reached a loss.

    The rows are the losses that `loss_thresholds` returns, some with a name such as "best of RUN". Each run has a
    column. A row without a name is left out if the next row has equal cells. A table is left out if all its rows have
    equal cells.
    """
    tables = []
    for number, members in enumerate(groups, 1):
        group = [logs[i] for i in members]
        rows = [(name, loss, [reached(log, loss) for log in group]) for name, loss in loss_thresholds(group)]
        lower = [cells for _, _, cells in rows[1:]] + [[]]
        rows = [row for row, below in zip(rows, lower, strict=True) if row[0] or row[2] != below]
        if len({tuple(cells) for _, _, cells in rows}) > 1:
            tables.append({"number": number, "members": members, "rows": rows})
    return tables


def chart_data(chart: Chart) -> dict[str, Any]:
    """Return a chart in the form that the page's script reads."""
    unit, _ = chart.x_unit
    levels = [
        {"value": value, "label": f"{html.escape(name.removeprefix('GPT-2 ').removesuffix(', published'))} {value:.4f}"}
        for name, value in chart.references
    ]
    return {
        "series": [series_data(chart, series) for series in chart.series],
        "levels": levels,
        "xlabel": "tokens" if chart.x == "tokens" else f"training time, {unit}",
        "xunit": unit,
        "xdigits": "" if chart.x == "tokens" else ":.2f",  # without a format, plotly writes tokens as on the axis: 2.5B
        "ylabel": chart.y,
        "digits": chart.digits,
        "range": chart.y_range,
    }


def series_data(chart: Chart, series: Series) -> dict[str, Any]:
    """Return a series in the form that the page's script reads. y values are exact, x values are rounded to float32."""
    return {
        "run": series.run,
        "kind": series.kind,
        "label": TOOLTIP_SUFFIXES[series.kind],
        "steps": pack(series.steps.astype(np.int32)),
        "x": pack(chart.x_values(series).astype(np.float32)),
        "y": pack(series.values),
    }
