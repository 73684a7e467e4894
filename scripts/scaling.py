"""Predict the validation loss of a run from smaller runs, by a law L(N, D) of parameters N and training tokens D:

    python -m scripts.scaling --train --seeds 1 2 --held-out 1 2
    python -m scripts.scaling --figure docs/scaling.png

With --train, small models are trained with the recipe and the dataset of a configuration, each in runs of several
lengths. A run that is already in the file of results (--results) is not repeated. With --train and --held-out SEEDS,
the configuration itself is trained, too, once with each seed. With --held-out-shapes, models with other layers and
channels are trained instead, for the configuration's number of steps. These held-out runs are left out of the fit.

Then a law is fitted to the small runs in the file, and its predictions are compared with the losses of the held-out
runs. `train.py --dry-run` predicts losses from docs/scaling.json, the default of --results. docs/scaling.md explains
the method.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.scaling")

import argparse
import functools
import itertools
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from command import CommandParser, ending
from files import write_json
from processes import start_processes
from scripts.recipes import spread
from scripts.sweep import as_flags, markdown, train_apart
from training.config import Config, parse_config
from training.inputs import open_inputs
from training.prediction import (
    MIN_LAYERS,
    RESULTS,
    Fit,
    Study,
    find_study,
    fit_study,
    observations,
    read_studies,
    recipe_of,
    size_of,
)
from training.scaling_law import FORMS, fit, leave_one_size_out

SHAPES = ("2x64", "3x96", "2x128", "3x128")
FRACTIONS = [1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4]
HELD_OUT = 4  # the held-out run has at least this many times the FLOPs of each small run


class Shape(NamedTuple):
    """The size of a model: its layers and channels."""

    n_layer: int
    n_embd: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Return the shape that a text such as 3x128 (3 layers, 128 channels) describes.

        Raises argparse.ArgumentTypeError for any other text.
        """
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
            raise argparse.ArgumentTypeError(f"{text}: expected LAYERSxCHANNELS, such as 3x128")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n_layer}x{self.n_embd}"


@functools.cache
def head_width(path: str) -> int:
    """Return the number of channels of each attention head in a configuration."""
    model = parse_config(["--config", path]).model_config(vocab_size=1)
    return model.n_embd // model.n_head


def arguments_of(path: str, shape: Shape, steps: int, seed: int) -> list[str]:
    """Return train.py's arguments for a run with this shape, length and seed. The run validates once, at its end.

    Raises ValueError if the channels are not a multiple of the width of the configuration's heads.
    """
    width = head_width(path)
    if shape.n_embd % width:
        raise ValueError(f"--shapes {shape}: the channels must be a multiple of {width}, the width of a head in {path}")
    fields = (
        f"model.n_layer={shape.n_layer} model.n_embd={shape.n_embd} model.n_head={shape.n_embd // width} "
        f"optim.steps={steps} run.seed={seed} run.name=scaling eval.every={steps} eval.at_start=false eval.samples=0 "
        f"eval.hellaswag=false checkpoint.every=0 log.every={steps}"
    ).split()
    return ["--config", path, *as_flags(fields)]


def describe(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe of a run, and the run's entry in the file of results.

    The entry lacks the keys "loss" and "held_out", which `train_all` adds.
    """
    inputs = open_inputs(config, None, verify=False)
    model = config.model_config(inputs.tokenizer.vocab_size)
    precision = start_processes(config.system.device, config.system.dtype).dtype
    size = {"layers": model.n_layer, "channels": model.n_embd, "steps": config.optim.steps, "seed": config.run.seed}
    entry = size | size_of(config, model) | {"precision": str(precision).removeprefix("torch.")}
    return recipe_of(config, model, inputs), entry


def train_run(arguments: list[str]) -> float:
    """Train a run in a temporary directory and return its loss. Raises FloatingPointError if it diverges."""
    loss = train_apart(arguments)
    if not math.isfinite(loss):
        raise FloatingPointError(f"this run has diverged, so it cannot be fitted: train.py {' '.join(arguments)}")
    return loss


def kept_runs(path: Path, config: str, recipe: dict[str, Any]) -> tuple[list[Study], list[dict[str, Any]]]:
    """Return all studies in a file, and the list of runs of the study with this recipe.

    If the file has no study of this recipe, a new study without runs is added to the returned studies. The file is read
    in each call, because another process may add runs to it.
    """
    studies = read_studies(path)
    study = find_study(studies, recipe)
    if study is None:
        study = {"config": config, "recipe": recipe, "runs": []}
        studies.append(study)
    return studies, study["runs"]


def train_all(args: argparse.Namespace) -> None:
    """Train the runs that the file of results lacks, and add each to the file when it ends.

    Small runs with more than 1 / HELD_OUT of the FLOPs of the configuration are skipped. Raises ValueError if a
    held-out run would have fewer FLOPs than the configuration.
    """
    base = parse_config(["--config", args.config])
    recipe, own = describe(base)
    lengths = sorted({round(fraction * base.optim.steps) for fraction in args.fractions})
    planned = list(itertools.product(args.seeds, args.shapes, lengths))
    large = args.held_out_shapes or [Shape(own["layers"], own["channels"])]
    held_out = list(itertools.product(args.held_out, large, [own["steps"]]))
    for seed, shape, steps in [*planned, *held_out]:
        arguments = arguments_of(args.config, shape, steps, seed)
        entry = describe(parse_config(arguments))[1]
        is_held_out = shape in large and steps == own["steps"]
        if is_held_out and entry["flops"] < own["flops"]:
            raise ValueError(
                f"--held-out-shapes {shape}: such a run has fewer FLOPs than {args.config}: choose a larger model"
            )
        settings = {name: value for name, value in entry.items() if name != "precision"}
        is_known = any(settings.items() <= run.items() for run in kept_runs(args.results, args.config, recipe)[1])
        if not is_known and (is_held_out or entry["flops"] * HELD_OUT <= own["flops"]):
            loss = train_run(arguments)
            print(f"{shape}, {steps} steps, seed {seed}: {loss:.4f}", file=sys.stderr)
            studies, runs = kept_runs(args.results, args.config, recipe)
            runs.append(entry | {"held_out": is_held_out, "loss": loss})
            write_json(args.results, studies)


def by_size(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the runs in groups of the same model and length. The groups are sorted by FLOPs."""

    def size(run: dict[str, Any]) -> tuple[int, ...]:
        return run["flops"], run["layers"], run["channels"], run["steps"]

    return [list(group) for _, group in itertools.groupby(sorted(runs, key=size), key=size)]


def fit_status(run: dict[str, Any], found: Fit) -> str:
    """Return "yes" if a run of a study was fitted, otherwise the reason why not."""
    if run in found.runs:
        return "yes"
    return "held out" if run["held_out"] else "one layer" if run["layers"] < MIN_LAYERS else "too short"


def run_table(study: Study, found: Fit) -> str:
    """Return the table of all runs: a row for each model and length, with the loss that the law predicts."""
    rows = []
    for group in by_size(study["runs"]):
        run, losses = group[0], [run["loss"] for run in group]
        predicted, low, high = found.predict(run)
        rows.append(
            [
                f"{run['layers']}x{run['channels']}, {run['steps']} steps",
                f"{run['parameters']:,}",
                f"{run['tokens']:,}",
                f"{run['flops']:.2g}",
                fit_status(run, found),
                spread(losses),
                " ".join(str(run["seed"]) for run in group),
                f"{predicted:.4f}",
                f"{low:.3f} to {high:.3f}",
                f"{predicted / statistics.mean(losses) - 1:+.2%}",
            ]
        )
    heads = ["run", "N", "D", "FLOPs", "fitted", "loss", "seeds", "law", "95% interval of a run", "error of the law"]
    return markdown(heads, rows)


def form_table(study: Study, found: Fit) -> str:
    """Return the table of the forms of the law (see `FORMS`), with two relative errors for each form.

    The first is the root mean square error of a cross-validation: each size (model and length) in turn is left out of
    the fit, and its runs are predicted. The second is the mean error, with its sign, for the held-out runs.
    """
    fitted = observations(found.runs)
    held_out = [run for run in study["runs"] if run["held_out"]]
    rows = []
    for name, form in FORMS.items():
        law = fit(fitted, form)
        terms = f"exp({law.log_A:.3f}) / N^{law.a:.4f} + exp({law.log_B:.3f}) / D^{law.b:.4f}"
        formula = f"{law.E:.3f} + {terms}" if law.c == 1 else f"{law.E:.3f} + ({terms})^{law.c:.4f}"
        errors = [law.loss(run["parameters"], run["tokens"]) / run["loss"] - 1 for run in held_out]
        rows.append(
            [
                f"**{name}**" if name == "general" else name,
                form.description,
                formula,
                f"{np.sqrt(np.square(leave_one_size_out(fitted, form)).mean()):.2%}",
                f"{statistics.mean(errors):+.2%}" if errors else "",
            ]
        )
    heads = ["form", "meaning", "L(N, D)", "error of sizes left out", "mean error of held-out runs"]
    return markdown(heads, rows)


def check(study: Study, found: Fit) -> list[str]:
    """Return a text for each held-out size: the prediction, its interval, the measured loss and the error."""
    lines = []
    for group in by_size([run for run in study["runs"] if run["held_out"]]):
        run, losses = group[0], [run["loss"] for run in group]
        predicted, low, high = found.predict(run)
        times = run["flops"] / max(fitted["flops"] for fitted in found.runs)
        seeds = f"{len(losses)} seed{'s' * (len(losses) > 1)}"
        lines.append(
            f"Held out, {times:.1f} times the FLOPs of the largest fitted run: {run['layers']}x{run['channels']}, "
            f"{run['steps']} steps. Predicted {predicted:.4f} ({low:.3f} to {high:.3f}), measured {spread(losses)} "
            f"({seeds}): error {predicted / statistics.mean(losses) - 1:+.2%}."
        )
    return lines


def draw(study: Study, found: Fit, path: Path) -> None:
    """Draw loss against tokens: fitted runs, the law as a curve for each model, held-out runs and their predictions.

    The prediction for a held-out run is a square to the right of the run, with a bar for its 95% interval.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    models = {(run["layers"], run["channels"]): run["parameters"] for run in found.runs}
    most, colors = max(run["tokens"] for run in study["runs"]), dict[tuple[int, int], Any]()
    for (layers, channels), parameters in sorted(models.items(), key=lambda item: item[1]):
        own = [r for r in found.runs if (r["layers"], r["channels"]) == (layers, channels)]
        label = f"{layers}x{channels}: N = {parameters:,}"
        (points,) = axes.plot([r["tokens"] for r in own], [r["loss"] for r in own], "o", markersize=4, label=label)
        tokens = np.geomspace(min(run["tokens"] for run in own), most, 50)
        axes.plot(tokens, found.law.loss(parameters, tokens), color=points.get_color(), linewidth=1)
        colors[layers, channels] = points.get_color()
    for i, group in enumerate(by_size([run for run in study["runs"] if run["held_out"]]), 1):
        run, (predicted, low, high) = group[0], found.predict(group[0])
        error, name = [[predicted - low], [high - predicted]], f"{run['layers']}x{run['channels']}"
        color = colors.get((run["layers"], run["channels"]), "black")
        place = run["tokens"] * 1.04**i
        axes.errorbar(place, predicted, yerr=error, fmt="s", color=color, capsize=4, label=f"{name} predicted")
        places, losses = [r["tokens"] for r in group], [r["loss"] for r in group]
        axes.plot(places, losses, "*", color=color, markeredgecolor="black", markersize=10, label=f"{name} held out")
    axes.set(xscale="log", xlabel="training tokens D", ylabel="validation loss, nats per token")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=100)


def report(args: argparse.Namespace) -> None:
    """Fit a law to the runs with the configuration's recipe, and print the result of `check` and two tables.

    Raises ValueError if the file of results has too few of these runs.
    """
    recipe = describe(parse_config(["--config", args.config]))[0]
    study = find_study(read_studies(args.results), recipe)
    found = study and fit_study(study)
    if not study or not found:
        raise ValueError(
            f"{args.results} has too few runs with the recipe and the dataset of {args.config}: train them with --train"
        )
    print(*check(study, found), form_table(study, found), run_table(study, found), sep="\n\n")
    if args.figure:
        draw(study, found, args.figure)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandParser(
        prog="python -m scripts.scaling", description="Predict the validation loss of a run from smaller runs."
    )
    add = parser.add_argument
    add(
        "--config",
        default="configs/shakespeare.yaml",
        metavar="FILE",
        help="YAML file of train.py: recipe, dataset and the run to predict (default: %(default)s)",
    )
    add("--train", action="store_true", help="train the runs that the file of results lacks, before the fit")
    add(
        "--shapes",
        nargs="*",
        type=Shape.parse,
        default=[*map(Shape.parse, SHAPES)],
        metavar="LxC",
        help=f"layers and channels of the models to train (default: {' '.join(SHAPES)})",
    )
    add(
        "--fractions",
        nargs="*",
        type=float,
        default=FRACTIONS,
        metavar="F",
        help="lengths to train, as fractions of the configuration's steps (default: 1/6 1/4 1/3 1/2 3/4)",
    )
    add("--seeds", nargs="*", type=int, default=[1, 2], help="seeds of the small runs (default: 1 2)")
    add(
        "--held-out",
        nargs="*",
        type=int,
        default=[],
        metavar="SEED",
        help="with --train: also train the configuration itself with these seeds",
    )
    add(
        "--held-out-shapes",
        nargs="*",
        type=Shape.parse,
        default=[],
        metavar="LxC",
        help="layers and channels of the held-out models (default: those of the configuration)",
    )
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="file with all runs (default: docs/scaling.json)")
    add("--figure", type=Path, metavar="PNG", help="draw the losses and the fit")
    args = parser.parse_args(arguments)
    with ending(parser, interrupted=f"\n{parser.prog}: stopped; the same command continues\n"):
        if args.train:
            train_all(args)
        report(args)


if __name__ == "__main__":
    main()
