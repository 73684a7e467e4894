"""Compare training recipes by the steps that they need to reach a loss, with the same model, data order and batch:

    python -m scripts.recipes --size characters --recipes present fast --fractions 1 0.85 0.75 --seeds 1 2 3

A recipe changes fields of a configuration, and may change the training loop with ideas of scripts/ideas.py. A size is a
model with a dataset, see SIZES. Each recipe is trained with each seed and each length. Lengths are given as fractions
of the steps of a full run. Each length needs its own run, because the learning rate decays to zero at the end of a run.
Runs that are already in the file of results are not repeated. The tables and the figure of docs/recipes.md come from
that file:

    python -m scripts.recipes --figure docs/recipes.png
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.recipes")

import argparse
import itertools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from command import CommandParser, ending
from files import write_json
from scripts.ideas import find_idea
from scripts.sweep import as_flags, markdown, train_apart

Losses = dict[int, dict[int, float]]  # steps -> seed -> validation loss
Results = dict[str, dict[str, Losses]]  # size -> recipe -> losses


class Size(NamedTuple):
    """The model, the dataset and the batch of an experiment, and the number of steps of a full run.

    `config` is a YAML file, and `fields` replace some of its values.
    """

    config: str
    steps: int
    fields: str = ""


class Recipe(NamedTuple):
    """Fields of the configuration that replace those in PRESENT (below), and names of ideas joined by plus signs."""

    fields: str = ""
    idea: str = ""

    def describe(self) -> str:
        """Return the change as options of scripts/sweep.py. If a field is given twice, the last value counts."""
        fields = dict(field.split("=", 1) for field in self.fields.split())
        options = [f"{name}={value}" for name, value in fields.items()]
        return " ".join([*options, f"--idea {self.idea}"] if self.idea else options)


# Fields of the sizes `plays` and `english`. bfloat16 halves the time of a run on a CPU with instructions for bfloat16.
SHORT_WINDOWS = (
    "model.block_size=128 data.sequence_length=128 data.batch_tokens=512 data.micro_batch=4 system.dtype=bfloat16"
)
SIZES = {  # parameters without embeddings: 0.8M, 3.2M, 7.9M
    "characters": Size("configs/shakespeare-char.yaml", 333),
    "plays": Size("docs/earlier-demo.yaml", 240, f"model.n_layer=4 model.n_embd=256 {SHORT_WINDOWS}"),
    "english": Size(
        "docs/earlier-demo.yaml", 240, f"data.dir=data/english model.n_layer=10 model.n_embd=256 {SHORT_WINDOWS}"
    ),
}
COMMON = (
    "eval.at_start=false eval.tokens=65536 eval.samples=0 checkpoint.every=0 log.every=100 "
    "system.device=cpu system.dtype=float32 system.compile=false"
)
# The recipe `present`, with which the other recipes are compared. `make demo` used it when the comparison was made.
PRESENT = (
    "optim.name=muon optim.muon_lr=0.02 optim.muon_momentum=0.95 optim.lr=1e-2 optim.betas=[0.9,0.95] "
    "optim.weight_decay=0.1 optim.grad_clip=1.0 optim.schedule=wsd optim.warmup_steps=20 optim.decay_fraction=0.6 "
    "optim.min_lr_ratio=0.0"
)
QUICK = "optim.warmup_steps=5 optim.muon_momentum=0.9"
FAST = f"{QUICK} optim.muon_lr=0.03"
FASTER = f"{FAST} optim.lr=2e-2 optim.betas=[0.8,0.95] optim.grad_clip=0"
SHORT_MEMORY = "optim.betas=[0.8,0.95] optim.grad_clip=0"
RECIPES = {
    "present": Recipe(),
    "lr-3e-3": Recipe("optim.lr=3e-3"),
    "momentum-0.9": Recipe("optim.muon_momentum=0.9"),
    "momentum-0.85": Recipe("optim.muon_momentum=0.85"),
    "momentum-0.9-decay-0.8": Recipe("optim.muon_momentum=0.9 optim.decay_fraction=0.8"),
    "short-memory-0.9": Recipe(f"{SHORT_MEMORY} optim.muon_momentum=0.9"),
    "short-memory-0.85": Recipe(f"{SHORT_MEMORY} optim.muon_momentum=0.85"),
    "short-memory-0.85-decay-0.8": Recipe(f"{SHORT_MEMORY} optim.muon_momentum=0.85 optim.decay_fraction=0.8"),
    "short-memory-0.85-normuon": Recipe(f"{SHORT_MEMORY} optim.muon_momentum=0.85", "normuon-columns"),
    "momentum-warm-up": Recipe(idea="momentum-warm-up"),
    "warm-up-5": Recipe("optim.warmup_steps=5"),
    "per-head": Recipe(idea="per-head"),
    "polar-express": Recipe(idea="polar-express"),
    "normuon-columns": Recipe(idea="normuon-columns"),
    "quick-normuon": Recipe(QUICK, "normuon-columns"),
    "quick-normuon-momentum-0.85": Recipe(f"{QUICK} optim.muon_momentum=0.85", "normuon-columns"),
    "quick-normuon-muon-0.03": Recipe(FAST, "normuon-columns"),
    "fast": Recipe(FAST),
    "fast-muon-0.05": Recipe(f"{FAST} optim.muon_lr=0.05"),
    "fast-lr-2e-2": Recipe(f"{FAST} optim.lr=2e-2"),
    "fast-momentum-0.8": Recipe(f"{FAST} optim.muon_momentum=0.8"),
    "fast-betas-0.8": Recipe(f"{FAST} optim.betas=[0.8,0.95]"),
    "fast-decay-0.8": Recipe(f"{FAST} optim.decay_fraction=0.8"),
    "fast-no-clipping": Recipe(f"{FAST} optim.grad_clip=0"),
    "faster": Recipe(FASTER),
    "faster-muon-0.04": Recipe(f"{FASTER} optim.muon_lr=0.04"),
    "fast-normuon": Recipe(FAST, "normuon"),
    "fast-polar-express": Recipe(FAST, "polar-express"),
    "fast-larger-wide": Recipe(FAST, "larger-wide"),
    "fast-outer-nesterov": Recipe(FAST, "outer-nesterov"),
    "fast-cautious-decay": Recipe(f"{FAST} optim.cautious_decay=true"),
    "fast-scheduled-decay": Recipe(FAST, "scheduled-decay"),
    "fast-undecayed-embeddings": Recipe(FAST, "undecayed-embeddings"),
    "fast-tail-average": Recipe(FAST, "tail-average"),
}


def arguments_of(size: Size, recipe: Recipe, steps: int, seed: int) -> list[str]:
    """Return train.py's arguments for a run on the CPU, with one validation after the last step."""
    fields = " ".join((COMMON, size.fields, PRESENT, recipe.fields)).split()
    fields += [f"optim.steps={steps}", f"eval.every={steps}", f"run.seed={seed}"]
    return ["--config", size.config, *as_flags(fields)]


def train_recipe(size: Size, recipe: Recipe, steps: int, seed: int) -> float:
    """Train one run in a temporary directory, and return its last validation loss."""
    return train_apart(arguments_of(size, recipe, steps, seed), find_idea(recipe.idea) if recipe.idea else None)


def read_results(path: Path) -> Results:
    """Return the losses of all runs so far. JSON has only text as keys, so steps and seeds are converted to numbers."""
    if not path.exists():
        return {}
    return {
        size: {
            recipe: {int(steps): {int(seed): loss for seed, loss in seeds.items()} for steps, seeds in losses.items()}
            for recipe, losses in recipes.items()
        }
        for size, recipes in json.loads(path.read_text(encoding="utf-8")).items()
    }


def p_value(differences: Sequence[float]) -> float:
    """Return the one-sided p-value of paired differences that should be negative, by the exact sign-flip test.

    If a recipe has no influence, each seed's difference is equally likely with the opposite sign (Fisher 1935, The
    Design of Experiments, section 21). The p-value is the fraction of all 2^n choices of signs for which the sum of the
    differences is at most the measured sum.
    """
    sums = [
        math.fsum(sign * difference for sign, difference in zip(signs, differences, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    # Equal sums can differ by rounding, because the losses are floating-point numbers.
    return sum(s <= math.fsum(differences) + 1e-12 for s in sums) / len(sums)


def compare(losses: dict[int, float], others: dict[int, float]) -> list[float]:
    """Return `losses` minus `others`, for each seed that both have."""
    return [losses[seed] - others[seed] for seed in sorted(losses.keys() & others.keys())]


def steps_to(target: float, losses: Losses, seed: int) -> float | None:
    """Return the number of steps after which a run with this seed would end with the loss `target`.

    `losses` has the final losses of runs with several lengths. Between neighboring lengths, the loss is interpolated,
    linearly in the logarithm of the steps. Return None if `target` is not between two of these losses.
    """
    points = sorted((steps, of_seed[seed]) for steps, of_seed in losses.items() if seed in of_seed)
    for (short, high), (long, low) in itertools.pairwise(points):
        if low <= target <= high:
            part = (high - target) / (high - low)
            return math.exp((1 - part) * math.log(short) + part * math.log(long))
    return None


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Return mean and standard deviation as text, such as "4.1250 ± 0.0031". With one value, return only this value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def loss_table(size: str, recipes: dict[str, Losses]) -> str:
    """Return the table that compares each recipe with the recipe `present` after the same number of steps."""
    rows = []
    for steps in sorted({steps for losses in recipes.values() for steps in losses}, reverse=True):
        base = recipes.get("present", {}).get(steps, {})
        found = {name: losses[steps] for name, losses in recipes.items() if steps in losses}
        for name, losses in sorted(found.items(), key=lambda item: statistics.mean(item[1].values())):
            differences = compare(losses, base) if name != "present" else []
            cells = [spread(differences), f"{p_value(differences):.4f}"] if differences else ["", ""]
            seeds = " ".join(map(str, sorted(losses)))
            options = f"`--size {size} --recipes {name} --fractions {steps / SIZES[size].steps:.4g} --seeds {seeds}`"
            change = f"`{RECIPES[name].describe()}`" if name != "present" else "none"
            rows.append([f"{steps}", spread(list(losses.values())), *cells, change, options])
    return markdown(["steps", "nats per token", "difference", "p", "change", "rerun with"], rows)


def steps_to_present(size: str, recipes: dict[str, Losses]) -> dict[str, list[float]]:
    """Return, for each recipe except `present` and each of its seeds, the steps to reach the loss of `present`.

    The loss of `present` is the mean final loss of its full runs. Only seeds with runs of several lengths are used. A
    recipe is left out if `steps_to` returns None for one of these seeds.
    """
    finals = recipes.get("present", {}).get(SIZES[size].steps)
    found = {}
    for name, losses in recipes.items():
        lengths = Counter(seed for of_seed in losses.values() for seed in of_seed)
        seeds = sorted(seed for seed, count in lengths.items() if count > 1)
        if finals and seeds and name != "present":
            steps = [steps_to(statistics.mean(finals.values()), losses, seed) for seed in seeds]
            if None not in steps:
                found[name] = [s for s in steps if s is not None]
    return found


def steps_table(size: str, recipes: dict[str, Losses]) -> str:
    """Return the table of the recipes, except `present`, that have runs with fewer steps than a full run.

    Runs of all lengths are compared with full runs of `present`. If the p-value of a shorter length is small, fewer
    steps are enough.
    """
    full, found = SIZES[size].steps, steps_to_present(size, recipes)
    base = recipes.get("present", {}).get(full, {})
    rows = []
    for name, losses in recipes.items():
        lengths = [(steps, compare(of_seed, base)) for steps, of_seed in sorted(losses.items()) if name != "present"]
        cells = [f"{n} steps: {spread(d)}, p = {p_value(d):.4f}, n = {len(d)}" for n, d in lengths if d]
        if cells and min(losses) < full:
            steps = found.get(name, [])
            fewer = f"{1 - statistics.mean(steps) / full:.0%}" if steps else ""
            rows.append([name, spread(steps, 0) if steps else "", fewer, f"{len(steps)}", "; ".join(cells)])
    heads = [
        "recipe",
        "steps to the loss of present",
        "fewer",
        "seeds",
        f"difference from the loss of present after {full} steps",
    ]
    return markdown(heads, rows) if rows else ""


def draw(results: Results, path: Path) -> None:
    """Draw loss against steps for `present` and recipes that have shorter runs. Error bars: ± 2 standard errors."""
    figure = Figure(figsize=(5 * len(results), 5.5), layout="constrained")
    for axes, (size, recipes) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        full = SIZES[size].steps
        for name, losses in recipes.items():
            if name == "present" or min(losses) < full:
                values = [np.array(list(losses[steps].values())) for steps in sorted(losses)]
                errors = [2 * v.std(ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values]
                means = [v.mean() for v in values]
                line = axes.errorbar(sorted(losses), means, yerr=errors, fmt="o-", capsize=3, label=name)
                if name == "present":
                    axes.axhline(means[-1], color=line[0].get_color(), linestyle="--", linewidth=1)
        axes.set(title=size, xlabel="steps of the run", ylabel="loss after the last step, nats per token")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize="small", ncols=2)  # below the axes
    figure.savefig(path, dpi=100)


def run_all(args: argparse.Namespace) -> Results:
    """Train the runs that the file of results lacks, add each result to the file, and return all results."""
    results, size = read_results(args.results), SIZES[args.size]
    for fraction, seed, name in itertools.product(args.fractions, args.seeds, args.recipes):
        steps = round(fraction * size.steps)
        seeds = results.setdefault(args.size, {}).setdefault(name, {}).setdefault(steps, {})
        if seed not in seeds:
            seeds[seed] = train_recipe(size, RECIPES[name], steps, seed)
            print(f"{args.size} {name} {steps} steps, seed {seed}: {seeds[seed]:.4f}", file=sys.stderr)
            write_json(args.results, results)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandParser(
        prog="python -m scripts.recipes", description="Compare recipes by the steps that they need to reach a loss."
    )
    parser.add_argument("--size", choices=SIZES, default="characters", help="model and data (default: %(default)s)")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=[], metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        default=[1.0],
        help="lengths of the runs, as fractions of the steps of the size (default: 1)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds (default: 1 2 3)")
    parser.add_argument("--results", type=Path, default="docs/recipes.json", metavar="FILE", help="file of results")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the final losses against the number of steps")
    args = parser.parse_args(arguments)
    with ending(parser, interrupted=f"\n{parser.prog}: stopped; the same command continues\n"):
        results = run_all(args)
        for size, recipes in results.items():
            print(f"## {size}\n", *filter(None, (steps_table(size, recipes), loss_table(size, recipes))), sep="\n\n")
        if args.figure:
            draw(results, args.figure)


if __name__ == "__main__":
    main()
