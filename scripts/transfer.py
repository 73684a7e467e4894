"""Measure how the best learning rates and weight decay depend on the width and the depth of a model:

    python -m scripts.transfer --sweep muon --shapes 64x4 512x4 --values 0.01 0.014 0.02 0.028 0.04 --seeds 1 2

A sweep varies one field of `optim`. A shape is WIDTHxLAYERS for a run of 100 steps, or WIDTHxLAYERSxSTEPS. Every value
is trained with every seed in every shape. Runs that are already in the file of results, docs/transfer.json, are not
repeated. The tables and the figure of docs/transfer.md come from that file:

    python -m scripts.transfer --figure docs/transfer.png
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.transfer")

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from command import CommandParser, ending
from files import write_json
from scripts.recipes import spread
from scripts.sweep import as_flags, markdown, train_apart
from training.transfer import Size, scale

Losses = dict[float, dict[int, float]]  # value of the swept field -> seed -> validation loss
HEAD_SIZE = 32  # channels of each head in every shape
LAYERS, WIDTH = 4, 64  # number of layers and channels of the base shape, see `series`
STEPS = 100  # optimizer steps of a run whose shape does not give their number


class Shape(NamedTuple):
    """The size of a model and the length of its run."""

    width: int
    layers: int
    steps: int = STEPS

    def __str__(self) -> str:
        return f"{self.width}x{self.layers}" + (f"x{self.steps}" if self.steps != STEPS else "")


def parse_shape(text: str) -> Shape:
    """Return the shape that a text such as 64x4 or 64x4x400 describes. Raises ArgumentTypeError for other texts."""
    parts = text.split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: expected WIDTHxLAYERS such as 64x4, or WIDTHxLAYERSxSTEPS")
    shape = Shape(*map(int, parts))
    if shape.width % HEAD_SIZE:
        raise argparse.ArgumentTypeError(f"{text}: the width must be a multiple of {HEAD_SIZE}, the size of a head")
    return shape


Results = dict[str, dict[Shape, Losses]]  # sweep -> shape -> losses


class Sweep(NamedTuple):
    """An optimizer, the field of `optim` that a sweep varies, and the fields that the sweep holds constant."""

    optimizer: str
    field: str
    held: str
    # The value of optim.lr at width 64 with 4 layers. The function `scale` computes the value for other shapes. If `lr`
    # is None, `held` or `field` sets optim.lr.
    lr: float | None = None
    dtype: str = "bfloat16"  # precision of the matrix products, `system.dtype`


BASE = "docs/earlier-demo.yaml"
COMMON = (
    "model.block_size=128 data.sequence_length=128 data.batch_tokens=1024 data.micro_batch=8 optim.schedule=wsd "
    "optim.warmup_steps=10 optim.decay_fraction=1.0 optim.min_lr_ratio=0.0 eval.at_start=false eval.tokens=65536 "
    "eval.final_tokens=null eval.samples=0 checkpoint.every=0 log.every=1000 system.device=cpu system.compile=false"
)
SWEEPS = {
    "muon": Sweep("muon", "muon_lr", "optim.weight_decay=0.1 optim.lr=0.01"),
    "muon-float32": Sweep("muon", "muon_lr", "optim.weight_decay=0.1 optim.lr=0.01", dtype="float32"),
    "muon-joint": Sweep("muon", "muon_lr", "optim.weight_decay=0.1", lr=0.018),  # optimum of sweep muon-lr, width 64
    "muon-lr": Sweep("muon", "lr", "optim.weight_decay=0.1 optim.muon_lr=0.04"),
    "muon-decay": Sweep("muon", "weight_decay", "optim.lr=0.01 optim.muon_lr=0.04"),
    "adamw": Sweep("adamw", "lr", "optim.weight_decay=0.1"),
}


def fields_of(sweep: Sweep, shape: Shape, value: float, seed: int) -> list[str]:
    """Return the fields of a run on the CPU, with one validation after the last step.

    The fields are sorted, so that two sweeps give equal lists for the same run.
    """
    fields = [*COMMON.split(), f"optim.name={sweep.optimizer}", *sweep.held.split(), f"optim.{sweep.field}={value:g}"]
    if sweep.lr is not None:
        factor = scale(sweep.optimizer, "lr", Size(WIDTH, LAYERS), Size(shape.width, shape.layers))
        fields.append(f"optim.lr={sweep.lr * factor:.4g}")
    fields.append(f"system.dtype={sweep.dtype}")
    fields += [f"model.n_embd={shape.width}", f"model.n_layer={shape.layers}", f"run.seed={seed}"]
    fields += [f"model.n_head={shape.width // HEAD_SIZE}", f"optim.steps={shape.steps}", f"eval.every={shape.steps}"]
    return sorted(fields)


def train_one(fields: list[str]) -> float:
    """Train one run in a temporary directory, and return its last validation loss."""
    return train_apart(["--config", BASE, *as_flags(fields)])


def read_results(path: Path) -> Results:
    """Return the losses of all runs so far. JSON has only text as keys, so the keys are converted here."""
    if not path.exists():
        return {}
    return {
        sweep: {
            parse_shape(shape): {
                float(value): {int(seed): loss for seed, loss in seeds.items()} for value, seeds in losses.items()
            }
            for shape, losses in shapes.items()
        }
        for sweep, shapes in json.loads(path.read_text(encoding="utf-8")).items()
    }


def write_results(path: Path, results: Results) -> None:
    """Write the losses as `read_results` reads them, sorted."""
    write_json(
        path,
        {
            sweep: {
                str(shape): {
                    f"{value:g}": {str(seed): losses[value][seed] for seed in sorted(losses[value])}
                    for value in sorted(losses)
                }
                for shape, losses in sorted(shapes.items())
            }
            for sweep, shapes in results.items()
        },
    )


def predict(name: str, old: Shape, new: Shape, value: float) -> float:
    """Return the best value of the swept field for `new` by the rule in `scale`, if `value` is the best for `old`."""
    sweep = SWEEPS[name]
    return value * scale(sweep.optimizer, sweep.field, Size(*old[:2]), Size(*new[:2]))


def find_optimum(losses: dict[float, float]) -> float | None:
    """Return the value with the lowest loss according to a parabola, or None if the values do not enclose a minimum.

    `best` is the value with the lowest measured loss. The values enclose a minimum if a smaller and a larger value than
    `best` were measured. The parabola is a function of the logarithm of the value. It is fitted by least squares to all
    values within a factor of about 2 of `best`. If it has no minimum between these values, the result is `best`.
    """
    points = {value: loss for value, loss in losses.items() if value > 0}
    if not points:
        return None
    best = min(points, key=points.__getitem__)
    if best in (min(points), max(points)):
        return None
    near = {v: loss for v, loss in points.items() if abs(math.log2(v / best)) < 1.1 and math.isfinite(loss)}
    if len(near) < 3:
        return best
    x = np.log2(np.array(list(near)) / best)
    square, slope, _ = np.polyfit(x, np.array(list(near.values())), 2)
    minimum = -slope / (2 * square)
    return best * 2.0**minimum if square > 0 and x.min() <= minimum <= x.max() else best


def seeds_of(losses: Losses) -> list[int]:
    """Return all seeds in `losses`, sorted."""
    return sorted({seed for seeds in losses.values() for seed in seeds})


def of_seed(losses: Losses, seed: int) -> dict[float, float]:
    """Return the losses of one seed, {value: loss}."""
    return {value: seeds[seed] for value, seeds in sorted(losses.items()) if seed in seeds}


def optima(losses: Losses) -> list[float]:
    """Return the optimum of each seed whose values enclose a minimum."""
    found = (find_optimum(of_seed(losses, seed)) for seed in seeds_of(losses))
    return [best for best in found if best is not None]


def excess(losses: Losses, value: float) -> float | None:
    """Return the loss at a value minus the lowest measured loss, as a mean over seeds.

    The loss is interpolated between the neighboring values, linearly in the logarithm of the value. A seed is left out
    if its measured values do not enclose `value`. If no seed remains, the result is None.
    """
    found = []
    for seed in seeds_of(losses):
        points = {v: loss for v, loss in of_seed(losses, seed).items() if v > 0}
        if points and min(points) <= value <= max(points):
            at_value = np.interp(math.log(value), np.log(list(points)), list(points.values()))
            found.append(float(at_value) - min(points.values()))
    return statistics.mean(found) if found else None


def series(shapes: Collection[Shape]) -> dict[str, list[Shape]]:
    """Return the series, {name: shapes}. A series has at least two shapes, which differ in one number only.

    This number is the width, the layers or the steps. The other two are those of the base shape (WIDTH, LAYERS, STEPS).
    There are also series of the width for other numbers of steps.
    """
    found = {
        "width": [s for s in shapes if s[1:] == (LAYERS, STEPS)],
        "layers": [s for s in shapes if (s.width, s.steps) == (WIDTH, STEPS)],
        "steps": [s for s in shapes if s[:2] == (WIDTH, LAYERS)],
    }
    for steps in sorted({s.steps for s in shapes} - {STEPS}):
        found[f"width, {steps} steps"] = [s for s in shapes if s[1:] == (LAYERS, steps)]
    return {name: sorted(members) for name, members in found.items() if len(members) > 1}


def describe_optimum(losses: Losses) -> str:
    """Return the geometric mean of the optima of all seeds as text, followed by their range if there are several.

    If the values enclose no minimum for any seed, return the bound from the first seed, such as "at least 0.04".
    """
    if found := optima(losses):
        several = f" ({min(found):.3g} to {max(found):.3g})" if len(found) > 1 else ""
        return f"{statistics.geometric_mean(found):.3g}{several}"
    points = of_seed(losses, seeds_of(losses)[0])
    best = min(points, key=points.__getitem__)
    return f"{'at most' if best == min(points) else 'at least'} {best:.3g}"


def optimum_table(results: Results) -> str:
    """Return the table that compares the optimum of each shape with the prediction from the first shape of its series.

    The last two columns have the ratio of the optimum to the prediction, as a power of √2 (+2 is a ratio of 2), and the
    result of `excess` at the prediction.
    """
    rows = []
    for name, shapes in results.items():
        for varied, members in series(shapes).items():
            base = optima(shapes[members[0]])
            for shape in members:
                cells = [name, varied, str(shape), describe_optimum(shapes[shape])]
                if base and shape != members[0]:
                    found = optima(shapes[shape])
                    predicted = predict(name, members[0], shape, statistics.geometric_mean(base))
                    steps = 2 * math.log2(statistics.geometric_mean(found) / predicted) if found else None
                    cost = excess(shapes[shape], predicted)
                    cells += [f"{predicted:.3g}", "" if steps is None else f"{steps:+.1f}"]
                    cells.append("" if cost is None else f"{cost:.4f}")
                rows.append(cells + [""] * (7 - len(cells)))
    heads = ["sweep", "series", "shape", "optimum", "predicted from the first", "steps of √2", "excess loss there"]
    return markdown(heads, rows)


def loss_table(name: str, shapes: dict[Shape, Losses]) -> str:
    """Return the table of the mean losses of a sweep: a row for each shape, a column for each value."""
    values = sorted({value for losses in shapes.values() for value in losses})
    rows = []
    for shape, losses in sorted(shapes.items()):
        cells = [spread(list(losses[value].values())) if value in losses else "" for value in values]
        rows.append([str(shape), *cells])
    return f"optim.{SWEEPS[name].field} of sweep {name}:\n\n" + markdown(["shape", *(f"{v:g}" for v in values)], rows)


def draw(results: Results, path: Path) -> None:
    """Draw the mean loss against the swept value: a panel for each series, with each shape's optimum as a star.

    For each shape, a dashed line shows the optimum that is predicted from the first shape of the series. Raises
    ValueError if there is no series.
    """
    panels = [(name, varied, m) for name, shapes in results.items() for varied, m in series(shapes).items()]
    if not panels:
        raise ValueError("there is nothing to draw: no two shapes of a sweep differ in one thing only")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    all_axes = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for (name, varied, members), axes in zip(panels, all_axes, strict=False):
        base = optima(results[name][members[0]])
        for shape in members:
            losses = results[name][shape]
            points = [(v, statistics.mean(seeds.values())) for v, seeds in sorted(losses.items()) if v > 0]
            points = [(v, loss) for v, loss in points if math.isfinite(loss)]
            (line,) = axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=str(shape))
            if found := optima(losses):
                best = statistics.geometric_mean(found)
                at_best = np.interp(math.log(best), [math.log(v) for v, _ in points], [loss for _, loss in points])
                axes.plot(best, at_best, "*", color=line.get_color(), markersize=12)
            if base:
                predicted = predict(name, members[0], shape, statistics.geometric_mean(base))
                axes.axvline(predicted, color=line.get_color(), linestyle="--", linewidth=1)
        axes.set(title=f"{name}: {varied}", xlabel=f"optim.{SWEEPS[name].field}", ylabel="nats per token", xscale="log")
        values = sorted({v for shape in members for v in results[name][shape] if v > 0})
        axes.set_xticks(values, [f"{v:g}" for v in values], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in all_axes:  # the iterator continues with the axes of the grid that have no series
        axes.remove()
    figure.savefig(path, dpi=100)


def run_all(args: argparse.Namespace) -> Results:
    """Train the runs that the file of results lacks, add each result to the file, and return all results.

    Two sweeps can contain the same run. Such a run is trained only once.
    """
    results = read_results(args.results)
    trained = {
        tuple(fields_of(SWEEPS[name], shape, value, seed)): loss
        for name, shapes in results.items()
        for shape, losses in shapes.items()
        for value, seeds in losses.items()
        for seed, loss in seeds.items()
    }
    for shape, seed, value in itertools.product(args.shapes, args.seeds, args.values):
        seeds = results.setdefault(args.sweep, {}).setdefault(shape, {}).setdefault(value, {})
        fields = fields_of(SWEEPS[args.sweep], shape, value, seed)
        if seed not in seeds:
            seeds[seed] = trained[tuple(fields)] if tuple(fields) in trained else train_one(fields)
            print(f"{args.sweep} {shape} {value:g}, seed {seed}: {seeds[seed]:.4f}", file=sys.stderr)
            write_results(args.results, results)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandParser(
        prog="python -m scripts.transfer",
        description="Measure how the best learning rates and weight decay depend on the size of a model.",
    )
    shapes = "sizes of the model, such as 64x4 (width 64, 4 layers), or 64x4x400 for 400 steps"
    parser.add_argument("--sweep", choices=SWEEPS, default="muon", help="sweep to run (default: %(default)s)")
    parser.add_argument("--shapes", nargs="*", type=parse_shape, default=[], metavar="SHAPE", help=shapes)
    parser.add_argument("--values", nargs="*", type=float, default=[], metavar="V", help="values of the swept field")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="seeds of each value (default: 1)")
    parser.add_argument("--results", type=Path, default="docs/transfer.json", metavar="FILE", help="file of results")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the losses and the optima of all series")
    args = parser.parse_args(arguments)
    with ending(parser, interrupted=f"\n{parser.prog}: stopped; the same command continues\n"):
        results = run_all(args)
        print(optimum_table(results), *(loss_table(name, shapes) for name, shapes in results.items()), sep="\n\n")
        if args.figure:
            draw(results, args.figure)


if __name__ == "__main__":
    main()
