"""The checks of report/doctor.py on the curves of a run. Each check looks for one kind of problem.

The thresholds were chosen on runs of models with 0.1 to 1.2 million parameters: on healthy runs, and on runs with a
known error. A run without findings can still be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from report.run_log import RunLog

WIDTH = 20  # the running median over WIDTH + 1 steps separates the trend of a loss curve from the noise


class Finding(NamedTuple):
    """Something that a check found in a run."""

    title: str
    evidence: str  # what the check saw, usually numbers
    advice: str = ""  # what to try
    problem: bool = True  # False for a note, which is worth knowing although nothing is wrong


@dataclass
class Curves:
    """The metrics of a run, and the settings that the checks need.

    Attributes:
        config: the content of config.yaml.
        train, val: columns of metrics.jsonl by name, (n,) each, with NaN for missing values.
        resumed: steps from which the run resumed.
        vocab_size, n_embd: fields of the model's configuration, or None if the run has no checkpoint.
        steps, losses: the training steps that have a finite loss, and this loss in nats per token, (n,) each.
        trend, residuals: the running median of `losses`, and `losses` minus this median, (n,) each.
        noise: the standard deviation of the residuals in the second half of the run, in nats per token.
    """

    config: dict[str, Any]
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    resumed: list[int]
    vocab_size: int | None
    n_embd: int | None

    def __post_init__(self) -> None:
        finite = np.isfinite(self.train["loss"])
        self.steps, self.losses = self.train["step"][finite], self.train["loss"][finite]
        self.trend = running_median(self.losses)
        self.residuals = self.losses - self.trend
        later = self.residuals[len(self.residuals) // 2 :]
        # 1.4826 times the median absolute deviation estimates the standard deviation. Outliers hardly change it.
        self.noise = 1.4826 * float(np.median(np.abs(later))) if len(later) else 0.0

    @property
    def from_scratch(self) -> bool:
        """True if model.init_from is scratch, also for a branch (`is_branch`), which begins with trained weights."""
        return self.config.get("model", {}).get("init_from", "scratch") == "scratch"

    @property
    def is_branch(self) -> bool:
        """True if the run begins with the weights of another run (run.branch_from)."""
        return self.config.get("run", {}).get("branch_from") is not None

    def optim(self, name: str, default: Any) -> Any:
        """Return a field of the section `optim`, or `default` if the configuration does not have it."""
        return self.config.get("optim", {}).get(name, default)


def find_curves(log: RunLog, vocab_size: int | None, n_embd: int | None) -> Curves:
    """Return the curves of a run. Raises ValueError if it has too few steps for the checks."""
    train, val = log.splits["train"], log.splits["val"]
    if (n := int(np.isfinite(train["loss"]).sum())) < 2 * WIDTH:
        raise ValueError(f"{log.directory} has {n} training steps with a finite loss: at least {2 * WIDTH} are needed")
    resumed = [start["resumed_at_step"] for start in log.provenance if start.get("resumed_at_step")]
    return Curves(log.config, train, val, resumed, vocab_size, n_embd)


def running_median(values: np.ndarray) -> np.ndarray:
    """Return for each value the median of the WIDTH + 1 values around it, or of fewer near both ends. (n,) -> (n,)"""
    half = WIDTH // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def first_loss(curves: Curves) -> Finding | None:
    """Compare the first loss with ln(vocab_size), the loss of a model that gives all tokens the same probability.

    An untrained model has nearly this loss.
    """
    if curves.vocab_size is None or curves.is_branch:
        return None
    at_start = len(curves.val["step"]) and curves.val["step"][0] == 0
    loss = float(curves.val["loss"][0] if at_start else curves.train["loss"][0])
    uniform = math.log(curves.vocab_size)
    evidence = f"first loss {loss:.2f} nats, random predictions have ln({curves.vocab_size:,}) = {uniform:.2f}"
    if loss > uniform + 0.5:
        advice = "check that the data was encoded with the model's tokenizer, and check the initialization"
        return Finding("the first loss is worse than random predictions", evidence, advice)
    if curves.from_scratch and loss < uniform - 1:
        advice = "check that the targets are not among the inputs, and that the weights are new"
        return Finding("the first loss is too low for an untrained model", evidence, advice)
    return None


def no_learning(curves: Curves) -> Finding | None:
    """Check that the loss falls by more than its noise. A branch is not checked: it may begin near its lowest loss."""
    if curves.is_branch:
        return None
    fall = curves.trend[0] - curves.trend.min()
    if fall > max(4 * curves.noise / math.sqrt(WIDTH), 0.02 * curves.trend[0]):
        return None
    evidence = f"the loss began at {curves.trend[0]:.3f} and its lowest running median is {curves.trend.min():.3f}"
    advice = "check which parameters are trained (model.freeze_layers), the learning rate, and that inputs are text"
    return Finding("the model does not learn", evidence, advice)


def rising_loss(curves: Curves) -> Finding | None:
    """Look for a training loss that ends far above its lowest value. A learning rate that is too high causes this."""
    low = int(curves.trend.argmin())
    rise = float(curves.trend[-WIDTH:].min() - curves.trend[low])
    if rise < max(6 * curves.noise / math.sqrt(WIDTH), 0.1):
        return None
    evidence = (
        f"lowest running median {curves.trend[low]:.3f} at step {curves.steps[low]:.0f}, at the end {rise:.3f} more"
    )
    return Finding(
        "the training loss rises", evidence, "lower the learning rate (optim.lr, optim.muon_lr) by 3 to 10 times"
    )


def early_instability(curves: Curves) -> Finding | None:
    """Look for a rise of the loss at the start.

    A missing warm-up can cause one, because Adam's first steps change each weight by about the whole learning rate.
    """
    end = max(2 * WIDTH, int(0.1 * len(curves.losses)))
    early = curves.losses[:end]
    peak = int(early.argmax())
    rise = float(early[peak] - early[0])
    if rise < max(6 * curves.noise, 0.3):
        return None
    warmup = curves.optim("warmup_steps", 0)
    evidence = f"the loss rose from {early[0]:.2f} to {early[peak]:.2f} in the first {curves.steps[peak]:.0f} steps"
    if warmup < 10:
        advice = "use a warm-up (optim.warmup_steps) of at least 20 steps"
        return Finding(f"the start is unstable, with a warm-up of {warmup} steps", evidence, advice)
    return Finding("the start is unstable", evidence, "lower the learning rate, or use a longer warm-up")


def learning_rate(curves: Curves) -> Finding | None:
    """Compare optim.lr with 6e-4 * 768 / n_embd, which is near the rates of GPT-3 (Brown et al. 2020, table 2.1).

    Also look for a very high learning rate of Muon, and for a warm-up that is too short.
    """
    if curves.n_embd is None:
        return None
    lr, usual, muon_lr = curves.optim("lr", 0.0), 6e-4 * 768 / curves.n_embd, curves.optim("muon_lr", 0.0)
    muon = curves.optim("name", "adamw") == "muon"
    evidence = f"optim.lr {lr:g}, usual for {curves.n_embd} channels: about {usual:.1g}"
    if lr > 6 * usual:
        return Finding("the learning rate is very high", evidence, f"try {usual:.1g}")
    if muon and muon_lr > 0.1:
        return Finding("Muon's learning rate is very high", f"optim.muon_lr {muon_lr:g}, usual: 0.02", "try 0.02")
    warmup = curves.optim("warmup_steps", 0)
    if curves.from_scratch and warmup < 10 and lr >= usual:
        return Finding(
            f"the warm-up has {warmup} steps",
            evidence,
            "Adam's first steps are as large as the learning rate allows: use optim.warmup_steps of at least 20",
        )
    return None


def spikes(curves: Curves) -> Finding | None:
    """Look for single steps with a far higher loss than their neighbors."""
    high = curves.residuals > max(8 * curves.noise, 0.3)
    high[: 2 * WIDTH] = False  # at the start, the running median cannot follow the fall of the loss
    if not high.any():
        return None
    where = ", ".join(f"{step:.0f}" for step in curves.steps[high][:8])
    evidence = f"{high.sum()} of {len(high):,} steps are more than 8 standard deviations above the trend: steps {where}"
    advice = "look at the text of these steps; if there are many, lower the learning rate or optim.grad_clip"
    return Finding("the loss has spikes", evidence, advice, problem=int(high.sum()) > 3)


def skipped_steps(curves: Curves) -> Finding | None:
    """Count the steps without a finite loss, which the training loop skips."""
    skipped = int(np.isnan(curves.train["loss"]).sum())
    if not skipped:
        return None
    return Finding(
        "steps were skipped because their loss was not finite",
        f"{skipped} of {len(curves.train['loss']):,} steps",
        "lower the learning rate; if the steps are always the same, look at their text",
    )


def float16_overflows(curves: Curves) -> Finding | None:
    """Count the overflows of float16. After each overflow, the gradient scaler halves the loss scale.

    A few overflows are normal, but a loss scale that ends below 1 is not.
    """
    scale = curves.train["loss_scale"]
    scale = scale[np.isfinite(scale)]
    if len(scale) < 2:
        return None
    overflows, last = int((np.diff(scale) < 0).sum()), float(scale[-1])
    if overflows <= max(16, 0.02 * len(scale)) and last >= 1:
        return None
    return Finding(
        "gradients overflow float16 too often",
        f"the loss scale was halved {overflows} times in {len(scale):,} steps, and is now {last:g}",
        "use --system.dtype float32 or bfloat16, or lower the learning rate",
    )


def noisy_batches(curves: Curves) -> Finding | None:
    """Look for a loss that varies much from step to step, which usually means that the batch is too small."""
    if curves.noise < 0.15:
        return None
    batch = curves.config.get("data", {}).get("batch_tokens", 0)
    return Finding(
        "the batch is too small",
        f"the loss of a step deviates from the trend by {curves.noise:.2f} nats, with {batch:,} tokens in a batch",
        "raise data.batch_tokens; micro-batches accumulate, so this needs no memory",
    )


def gradient_growth(curves: Curves) -> Finding | None:
    """Look for a gradient norm that grows during training, which often comes before divergence."""
    norm = curves.train["grad_norm"]
    norm = norm[np.isfinite(norm)]
    quarter = len(norm) // 4
    if not quarter:
        return None
    before, after = float(np.median(norm[quarter : 2 * quarter])), float(np.median(norm[-quarter:]))
    if after < 5 * max(before, 1e-12):
        return None
    return Finding(
        "the gradient grows",
        f"median norm {before:.3g} in the second quarter of the steps, {after:.3g} in the last one",
        "lower the learning rate, and raise optim.weight_decay",
    )


def periodic_loss(curves: Curves) -> Finding | None:
    """Look for a periodic loss. Text that is not shuffled, or that is repeated, makes the loss periodic."""
    x = curves.residuals[2 * WIDTH :]
    if len(x) < 4 * WIDTH or not x.std():
        return None
    x = np.clip(x, *np.quantile(x, [0.01, 0.99]))
    x = x - x.mean()
    spectrum = np.abs(np.fft.rfft(x, 2 * len(x))) ** 2
    correlation = np.fft.irfft(spectrum)[: len(x)] / (x @ x)
    lags = np.arange(4, len(x) // 3)
    # The correlation at lag k is a sum of only len(x) - k products, so it is too small by the factor 1 - k / len(x).
    unbiased = correlation[lags] / (1 - lags / len(x))
    best = int(unbiased.argmax())
    if unbiased[best] < max(0.4, 6 / math.sqrt(len(x))):
        return None
    shuffled = curves.config.get("data", {}).get("shuffle", True)
    return Finding(
        "the loss repeats with a period",
        f"steps at a distance of {lags[best]} have a correlation of {unbiased[best]:.2f}; data.shuffle is {shuffled}",
        "set data.shuffle to true; if it is, look for repeated text in the dataset",
    )


def jump_at_resume(curves: Curves) -> Finding | None:
    """Look for a sudden rise of the loss where the run was resumed. A missing optimizer state causes one."""
    for step in curves.resumed:
        before, after = (
            curves.losses[(curves.steps > first) & (curves.steps <= first + 5)] for first in (step - 5, step)
        )
        if len(before) < 3 or len(after) < 3:
            continue
        jump = float(np.median(after) - np.median(before))
        if jump > max(5 * curves.noise, 0.15):
            return Finding(
                "the loss jumps where the run was resumed",
                f"median of five losses before step {step}: {np.median(before):.3f}, after it: {np.median(after):.3f}",
                "the checkpoint lacks the optimizer state or has other weights: resume from an earlier one",
            )
    return None


def sudden_rise(curves: Curves) -> Finding | None:
    """Look for a step after which the loss stays higher. A resume that provenance.json does not record can cause this.

    If `jump_at_resume` finds a rise, the result is None, so that the same rise is not reported twice.
    """
    if len(curves.losses) < 3 * WIDTH or jump_at_resume(curves):
        return None
    medians = np.median(np.lib.stride_tricks.sliding_window_view(curves.losses, 5), axis=1)
    # For each step after the first 2 * WIDTH: the median of the five losses from this step on, minus the median of the
    # five losses before it.
    rises = (medians[5:] - medians[:-5])[2 * WIDTH - 5 :]
    first = int(rises.argmax())
    # The factor is higher than in `jump_at_resume`: this check looks at all steps, so noise exceeds a limit more often.
    if rises[first] < max(6 * curves.noise, 0.15):
        return None
    step = curves.steps[first + 2 * WIDTH]
    return Finding(
        "the loss suddenly rises",
        f"the median of the five losses from step {step:.0f} is {rises[first]:.3f} above that of the five before",
        "if the run was resumed there, weights, optimizer state or position in the data were lost: resume from an "
        "earlier checkpoint; otherwise look at the text of these steps",
    )


def missing_steps(curves: Curves) -> Finding | None:
    """Check that every step is logged exactly once."""
    gaps = np.flatnonzero(np.diff(curves.train["step"]) != 1)
    if not len(gaps):
        return None
    first, second = curves.train["step"][gaps[0]], curves.train["step"][gaps[0] + 1]
    return Finding(
        "steps are missing or repeated in metrics.jsonl",
        f"step {first:.0f} is followed by step {second:.0f}" + (f", {len(gaps)} such places" if len(gaps) > 1 else ""),
        "metrics.jsonl was edited, or two runs wrote to it",
    )


def slower_steps(curves: Curves) -> Finding | None:
    """Check that the throughput in the last quarter of the steps is not far below that in the first half."""
    rate = curves.train["tokens_per_second"]
    rate = rate[np.isfinite(rate)]
    if len(rate) < 4 * WIDTH:
        return None
    before, after = float(np.median(rate[: len(rate) // 2])), float(np.median(rate[-len(rate) // 4 :]))
    if after > 0.6 * before:
        return None
    return Finding(
        "training became slower",
        f"{before:,.0f} tokens/s in the first half, {after:,.0f} in the last quarter",
        "look for other processes on this machine, thermal throttling, and a slow disk (data_seconds in metrics.jsonl)",
        problem=False,
    )


def overfitting(curves: Curves) -> Finding | None:
    """Look for a validation loss that rises again. Text that is repeated too often causes this."""
    loss = curves.val["loss"]
    if len(loss) < 3 or not np.isfinite(loss).all():
        return None
    best = int(loss.argmin())
    if loss[-1] < loss[best] + 0.03:
        return None
    return Finding(
        "the model overfits",
        f"validation loss {loss[best]:.3f} after step {curves.val['step'][best]:.0f}, {loss[-1]:.3f} at the end, while "
        f"the training loss is {curves.trend[-1]:.3f}",
        "use the best checkpoint, fewer steps (eval.patience), dropout, more weight decay, or more text",
    )


def validation_gap(curves: Curves) -> Finding | None:
    """Compare the last validation loss with the training loss at the same step. Without overfitting, they are close."""
    if not len(curves.val["loss"]) or not np.isfinite(curves.val["loss"][-1]):
        return None
    step, loss = curves.val["step"][-1], float(curves.val["loss"][-1])
    near = curves.losses[(curves.steps > step - WIDTH) & (curves.steps <= step)]
    if not len(near) or abs(gap := loss - float(np.median(near))) < 1:
        return None
    return Finding(
        "validation and training loss differ",
        f"validation {loss:.3f}, training {np.median(near):.3f} at the same step, a difference of {gap:+.2f}",
        "check that both splits have the same kind of text",
        problem=gap < 0,
    )


CHECKS = (
    first_loss,
    no_learning,
    rising_loss,
    early_instability,
    learning_rate,
    spikes,
    skipped_steps,
    float16_overflows,
    noisy_batches,
    gradient_growth,
    periodic_loss,
    jump_at_resume,
    sudden_rise,
    missing_steps,
    slower_steps,
    overfitting,
    validation_gap,
)
