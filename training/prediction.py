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
from training.scaling_law import FORMS, Law, Observations, bootstrap, fit, interval
from training.start import run_identity

# Written by scripts/scaling.py. An installation may lack the file; then nothing is predicted.
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "scaling.json"
SIZES = ("n_layer", "n_head", "n_embd")  # fields of GPTConfig that differ between the runs of a `Study` (below)

# A run whose warm-up is more than a tenth of its steps does not follow the law of longer runs (docs/scaling.md).
MIN_STEPS = 10  # minimum number of steps of a fitted run, as a multiple of the warm-up
# With one layer, attention combines single tokens, and cannot use what attention in another layer has found (Elhage et
# al. 2021, https://transformer-circuits.pub/2021/framework). The loss of such a model does not follow the law of deeper
# models (docs/scaling.md).
MIN_LAYERS = 2
SAMPLES = 200  # number of laws that `bootstrap` fits for each of FORMS; intervals are computed from these laws

# Runs with the same recipe. The keys are "config", the configuration file; "recipe", see `recipe_of`; and "runs".
Study = dict[str, Any]


class Fit(NamedTuple):
    """A law that was fitted to the runs of a study, and the data that `predict` and `extrapolations` need."""

    law: Law
    samples: np.ndarray  # (forms * SAMPLES, 7), the rows of `bootstrap` for all forms; intervals come from them
    runs: list[dict[str, Any]]  # the fitted runs; predictions outside their range are extrapolations

    def predict(self, run: dict[str, Any]) -> tuple[float, float, float]:
        """Return the expected loss and the two ends of its 95% interval. `run` has the keys that `size_of` returns."""
        size = run["parameters"], run["tokens"]
        return float(self.law.loss(*size)), *interval(self.samples, *size)

    def extrapolations(self, run: dict[str, Any]) -> list[str]:
        """Return a text such as "2.0 times the most tokens" for each size of `run` outside the range of fitted runs."""
        found = []
        for name, unit in (("parameters", "parameters"), ("tokens", "tokens"), ("flops", "FLOPs")):
            values = [fitted[name] for fitted in self.runs]
            if run[name] > max(values):
                found.append(f"{run[name] / max(values):.1f} times the most {unit}")
            elif run[name] < min(values):
                found.append(f"{min(values) / run[name]:.1f} times fewer than the fewest {unit}")
        return found


def recipe_of(config: Config, model: GPTConfig, inputs: Inputs) -> dict[str, Any]:
    """Return, as JSON values, the settings that must be equal in fitted runs and in the run that the fit predicts.

    These are all settings that determine the loss, except the model's size, the steps, the seed and the precision.
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
    """Return the size of a run: its parameters (with embeddings), its training tokens and its FLOPs."""
    n_parameters, tokens = count_parameters(model), config.optim.steps * config.data.batch_tokens
    return {
        "parameters": n_parameters,
        "tokens": tokens,
        "flops": flops_per_token(model, n_parameters, config.data.sequence_length) * tokens,
    }


def read_studies(path: Path) -> list[Study]:
    """Return the studies in a file that scripts/scaling.py wrote, or [] if there is no file.

    Raises ValueError if the file has other content.
    """
    try:
        studies = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not all({"recipe", "runs"} <= study.keys() for study in studies):
            raise ValueError("a study lacks its recipe or its runs")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of scripts/scaling.py ({error}): restore it, or delete it") from None
    return studies


def find_study(studies: list[Study], recipe: dict[str, Any]) -> Study | None:
    """Return the study whose runs have this recipe, or None if there is no such study.

    If the recipe of an older study lacks a setting, its runs were trained with the setting's default.
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
    """Return the sizes and losses of runs of a study as arrays."""
    return Observations(*(np.array([float(run[name]) for run in runs]) for name in ("parameters", "tokens", "loss")))


def fit_study(study: Study, *, with_held_out: bool = False) -> Fit | None:
    """Fit a law to the runs of a study that have enough steps (MIN_STEPS) and layers (MIN_LAYERS).

    Return None if these runs have too few different sizes (parameters, tokens). By default, the runs that are marked as
    held out are not fitted: the caller compares their losses with predictions, to check the law.

    The law has the general form, in which all numbers are fitted. The intervals come from all forms, because forms that
    fit small runs equally well can disagree about a larger run.
    """
    shortest = MIN_STEPS * study["recipe"]["optim"]["warmup_steps"]
    used = [run for run in study["runs"] if with_held_out or not run["held_out"]]
    runs = [run for run in used if run["steps"] >= shortest and run["layers"] >= MIN_LAYERS]
    observed = observations(runs)
    if len({(run["parameters"], run["tokens"]) for run in runs}) <= max(
        form.matrix.shape[1] for form in FORMS.values()
    ):
        return None
    laws = {name: fit(observed, form) for name, form in FORMS.items()}
    samples = [bootstrap(observed, form, laws[name], SAMPLES) for name, form in FORMS.items()]
    return Fit(laws["general"], np.concatenate(samples), runs)


def describe_expected_loss(config: Config, model: GPTConfig, inputs: Inputs) -> list[str]:
    """Return lines with the expected validation loss of a run.

    Return [] if the model has fewer than MIN_LAYERS layers, or if no study with the recipe of the run has enough runs.
    """
    if model.n_layer < MIN_LAYERS:
        return []
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
