"""The expected validation loss of a run, from a fit to smaller runs with the same recipe: see docs/scaling.md."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model import GPTConfig
from training.config import Config
from training.estimate import count_parameters, flops_per_token
from training.inputs import Inputs
from training.scaling_law import FORMS, Law, Observations, bootstrap, fit, interval, leave_one_size_out
from training.start import run_identity

# Written by scripts/scaling.py. An installation may lack the file; then nothing is predicted.
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "scaling.json"
SIZES = ("n_layer", "n_head", "n_embd")  # of the model, which the runs of a study vary

# The warm-up has the same number of steps in all runs, and takes a larger part of a short run. Runs in which it takes
# more than a tenth of the steps do not follow the law of the longer ones (docs/scaling.md).
MIN_STEPS = 10  # of a fitted run, relative to the steps of the warm-up
SAMPLES = 200  # laws of the bootstrap for each form, from which intervals are computed

Study = dict[str, Any]  # "config": the file of the configuration, "recipe": see `recipe_of`, and "runs"


class Fit(NamedTuple):
    """The law that fits the smaller runs of a study, and what its intervals and limits need."""

    form: str  # name in FORMS
    law: Law
    errors: dict[str, float]  # of each form: root mean square relative error of runs of a size that was left out
    samples: np.ndarray  # (forms * SAMPLES, 7), of `bootstrap` with each form
    runs: list[dict[str, Any]]  # that were fitted

    def predict(self, run: dict[str, Any]) -> tuple[float, float, float]:
        """Return the expected loss of a run of this size, and the 95% interval that contains it."""
        size = run["parameters"], run["tokens"]
        return float(self.law.loss(*size)), *interval(self.samples, *size)

    def extrapolations(self, run: dict[str, Any]) -> list[str]:
        """Return in which quantities a run is outside the range of the fitted runs, and by what factor."""
        found = []
        for name, unit in (("parameters", "parameters"), ("tokens", "tokens"), ("flops", "FLOPs")):
            values = [fitted[name] for fitted in self.runs]
            if run[name] > max(values):
                found.append(f"{run[name] / max(values):.1f} times the most {unit}")
            elif run[name] < min(values):
                found.append(f"{min(values) / run[name]:.1f} times fewer than the fewest {unit}")
        return found


def recipe_of(config: Config, model: GPTConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what two runs must have in common so that a fit to one can predict the other, as plain values.

    This is all that determines the loss, except the model's size, the number of steps, the seed and the precision. It
    includes the hashes of the dataset and the number of validation tokens. All heads must have the same width.
    """
    identity = run_identity(config, model, inputs)
    del identity["run"]["seed"], identity["optim"]["steps"]
    for name in SIZES:
        del identity["model"][name]
    identity["model"]["head_width"] = model.n_embd // model.n_head
    windows = (inputs.final_val or inputs.val).values()
    identity["dataset"]["validation_tokens"] = sum(part.count(np.arange(len(part))) for part in windows)
    return json.loads(json.dumps(identity))


def size_of(config: Config, model: GPTConfig) -> dict[str, int]:
    """Return the size of a run: its parameters without embeddings, and its training tokens and FLOPs."""
    n_parameters, tokens = count_parameters(model), config.optim.steps * config.data.batch_tokens
    return {
        "parameters": n_parameters - (model.vocab_size + model.block_size) * model.n_embd,
        "tokens": tokens,
        "flops": flops_per_token(model, n_parameters, config.data.sequence_length) * tokens,
    }


def read_studies(path: Path) -> list[Study]:
    """Return the studies in a file that scripts/scaling.py wrote, or [] if there is no file.

    Raises ValueError if it is not such a file.
    """
    try:
        studies = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not all({"recipe", "runs"} <= study.keys() for study in studies):
            raise ValueError("a study lacks its recipe or its runs")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of scripts/scaling.py ({error}): restore it, or delete it") from None
    return studies


def find_study(studies: list[Study], recipe: dict[str, Any]) -> Study | None:
    """Return the study whose runs have this recipe, or None.

    A study that lacks a setting is older than the setting, and its runs were trained with the default.
    """
    defaults = Config().to_dict() | {"model": dataclasses.asdict(GPTConfig())}

    def same(recorded: dict[str, Any]) -> bool:
        complete = {
            section: {name: fields.get(name, defaults.get(section, {}).get(name)) for name in recipe[section]}
            for section, fields in recorded.items()
            if section in recipe and fields.keys() <= recipe[section].keys()
        }
        return complete == recipe

    return next((study for study in studies if same(study["recipe"])), None)


def observations(runs: list[dict[str, Any]]) -> Observations:
    """Return the sizes and losses of runs as arrays."""
    return Observations(*(np.array([float(run[name]) for run in runs]) for name in ("parameters", "tokens", "loss")))


def fit_study(study: Study, *, with_held_out: bool = False) -> Fit | None:
    """Fit the runs of a study that are long enough; None if they have too few sizes.

    The held-out runs are fitted only `with_held_out`: to predict other runs, but not to check the law.

    Of the forms of the law, the one is chosen that predicts the runs of each size best from those of the other sizes.
    The interval comes from all forms: those that fit small runs equally well can disagree about a larger one.
    """
    shortest = MIN_STEPS * study["recipe"]["optim"]["warmup_steps"]
    used = [run for run in study["runs"] if with_held_out or not run["held_out"]]
    runs = [run for run in used if run["steps"] >= shortest]
    observed = observations(runs)
    if len({(run["parameters"], run["tokens"]) for run in runs}) <= max(
        form.matrix.shape[1] for form in FORMS.values()
    ):
        return None
    errors = {name: float(np.sqrt((leave_one_size_out(observed, form) ** 2).mean())) for name, form in FORMS.items()}
    best = min(errors, key=lambda name: errors[name])
    law = fit(observed, FORMS[best])
    samples = [bootstrap(observed, form, fit(observed, form), SAMPLES) for form in FORMS.values()]
    return Fit(best, law, errors, np.concatenate(samples), runs)


def describe_expected_loss(config: Config, model: GPTConfig, inputs: Inputs) -> list[str]:
    """Return lines with the expected validation loss, or [] if no runs with this recipe and dataset were kept."""
    study = find_study(read_studies(RESULTS), recipe_of(config, model, inputs))
    found = study and fit_study(study, with_held_out=True)
    if not study or not found:
        return []
    size = size_of(config, model)
    loss, low, high = found.predict(size)
    tokens = study["recipe"]["dataset"]["validation_tokens"]
    lines = [
        f"loss        expected validation loss {loss:.3f} (95% interval {low:.3f} to {high:.3f}) on {tokens:,} tokens,",
        f"            from {len(found.runs)} runs (docs/scaling.md)",
    ]
    if outside := found.extrapolations(size):
        lines[-1] += f", extrapolated: {', '.join(outside)} of these runs"
    return lines
