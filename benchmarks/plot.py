"""Draw what `bench.py attention --json FILE` measured: `python -m benchmarks.plot FILE docs/long-context.png`."""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m benchmarks.plot")

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from benchmarks.workload import ATTENTIONS
from command import CommandParser, ending


def draw(tables: list[dict[str, Any]]) -> Figure:
    """Draw seconds and peak memory of each kind of attention against the number of tokens."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = [
        ("seconds", 1.0, "seconds, forward and backward"),
        ("peak_memory", 2**20, "peak memory of the process, MiB"),
    ]
    tokens = [table["tokens"] for table in tables]
    for axes, (name, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for attention in ATTENTIONS:
            values = [table["results"][attention][name] / unit for table in tables]
            axes.plot(tokens, values, "o-", label=attention)
        axes.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(tokens, [f"{n:,}" for n in tokens])
        axes.minorticks_off()
        # By default only powers of ten have labels, but there may be no power of ten in the range of the axis.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandParser(
        prog="python -m benchmarks.plot", description="Draw time and memory of the three kinds of attention."
    )
    parser.add_argument("results", type=Path, help="file that bench.py attention --json wrote")
    parser.add_argument("png", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    with ending(parser):
        content = json.loads(args.results.read_text())
        found = content.get("tables", []) if isinstance(content, dict) else []
        tables = [table for table in found if table["title"] == "attention"]
        if not tables:
            raise ValueError(
                f"{args.results} has no results of bench.py attention: write them with `bench.py attention --json FILE`"
            )
        draw(tables).savefig(args.png, dpi=100)


if __name__ == "__main__":
    main()
