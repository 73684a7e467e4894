"""Runs as a page: their curves beside GPT-2's, what they were evaluated at, what they wrote, how they were made.

python -m report runs/shakespeare                     runs/shakespeare/report.html
python -m report runs/a runs/b --out compared.html    several, one over another

One HTML file that opens without a network, and a PNG of every chart beside it. Evaluations are found where eval.run
leaves them: `python -m eval.run --model RUN --tasks hellaswag,lambada --json RUN/eval.json`, any name ending in .json.
"""

from __future__ import annotations

import argparse
import html
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from report.page import command_line, pack, plotly_script, write_page

if TYPE_CHECKING:  # imports torch
    from report.runs import Chart, Series

LABELS = {"step": ", each step", "mean": ", running mean", "validation": ", validation", "value": ""}


def add_arguments(add: Callable[..., Any]) -> None:
    add("runs", nargs="+", type=Path, metavar="RUN", help="a directory that train.py made")
    add("--out", type=Path, metavar="FILE", help="default: report.html in the run, or here if there are several")


def run(args: argparse.Namespace) -> None:
    """Read the runs, write the page and the PNGs."""
    import yaml

    from report.curves import draw_chart
    from report.runs import (
        SIZES,
        by_validation_set,
        differences,
        evaluation_table,
        loss_levels,
        make_charts,
        reached,
        read_run,
        summary,
    )

    names = [directory.resolve().name for directory in args.runs]
    runs = [
        read_run(directory, str(directory) if names.count(name) > 1 else name)
        for directory, name in zip(args.runs, names, strict=True)
    ]
    out = args.out or (args.runs[0] if len(runs) == 1 else Path()) / "report.html"
    charts = make_charts(runs)
    groups = by_validation_set(runs)
    reach = []
    for number, members in enumerate(groups, 1):
        of_set = [runs[i] for i in members]
        rows = [(name, loss, [reached(run, loss) for run in of_set]) for name, loss in loss_levels(of_set)]
        if rows:
            reach.append({"number": number, "members": members, "rows": rows})
    write_page(
        out,
        "runs.html",
        title=f"Training run: {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs",
        data={"runs": [html.escape(run.name) for run in runs], "charts": [chart_data(chart) for chart in charts]},
        runs=runs,
        summaries=[summary(run) for run in runs],
        groups=groups,
        charts=charts,
        measured_hellaswag=any(run.convention for run in runs),
        reach=reach,
        evaluations=evaluation_table(runs),
        sizes=list(SIZES.values()),
        differences=differences(runs),
        yaml=lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
        plotly=plotly_script(),
    )
    for chart in charts:
        draw_chart(chart, [run.name for run in runs], out.with_name(f"{out.stem}-{chart.key}.png"))
    print(f"{out.with_name(out.stem)}-*.png  ({len(charts)} charts)")


def chart_data(chart: Chart) -> dict[str, Any]:
    """A chart as the page's script reads it."""
    unit, _ = chart.x_unit
    levels = [
        {"value": value, "label": f"{html.escape(name.removeprefix('GPT-2 ').removesuffix(', published'))} {value:.4f}"}
        for name, value in chart.levels
    ]
    return {
        "series": [series_data(chart, series) for series in chart.series],
        "levels": levels,
        "xlabel": "tokens" if chart.x == "tokens" else f"training time, {unit}",
        "xunit": unit,
        "xdigits": "" if chart.x == "tokens" else ":.2f",  # plotly tells tokens as on the axis: 2.5B
        "ylabel": chart.y,
        "digits": chart.digits,
        "range": chart.y_range,
    }


def series_data(chart: Chart, series: Series) -> dict[str, Any]:
    """A line of it. y is exact; x is drawn in float32."""
    return {
        "run": series.run,
        "kind": series.kind,
        "label": LABELS[series.kind],
        "steps": pack(series.steps.astype(np.int32)),
        "x": pack(chart.x_values(series).astype(np.float32)),
        "y": pack(series.values),
    }


if __name__ == "__main__":
    command_line("report", __doc__, add_arguments, run)
