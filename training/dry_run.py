"""Estimate what a run costs, without training: `train.py --dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints import read_state
from device import CARDS, DTYPES, Card, find_card
from model import GPTConfig
from pretrained import find_model
from processes import Processes
from training.config import Config, Flags
from training.estimate import Hardware, Workload, count_parameters
from training.inputs import Inputs, describe_epochs, open_inputs, warnings
from training.metrics import duration
from training.plan import GPU_SHARE, usable_memory
from training.prediction import describe_expected_loss
from training.start import Start, choose_model, describe_start, find_start, read_saved_state, run_identity
from training.step_time import CPU_SHARE, PUBLISHED, estimate_step, seconds_on_cpu
from training.transfer import describe_rates

GPT2_VOCABULARY = 50257  # the size to assume if there is neither a dataset nor a model to start from


class Target(NamedTuple):
    """The hardware that a dry run estimates for."""

    name: str  # name of each device, such as H100
    hardware: Hardware
    card: Card | None  # None if the device is not in device.CARDS
    budget: float  # largest number of bytes that a run may need on each device


def dry_run(config: Config, processes: Processes, flags: Flags) -> tuple[str, str]:
    """Return the text that `train.py --dry-run` prints, and a message about what a run on this machine lacks.

    `flags.dry_run` names the hardware, such as 8xH100. If it is "", the hardware is that of this process. The message
    is "" if nothing is missing, or if `flags.dry_run` names hardware.

    Raises ValueError or OSError if the dataset is damaged, if the model or the name of the hardware is wrong, or if the
    run cannot start from the checkpoint of run.resume or run.branch_from.
    """
    target = find_target(config, processes, flags.dry_run or "")
    start, absent = find_start_alone(config, processes)
    initial = start.model
    inputs: Inputs | None = None
    missing = ""
    try:
        inputs = open_inputs(config, initial, verify=flags.verify)
    except FileNotFoundError as error:
        missing = str(error)
    vocab_size = GPT2_VOCABULARY if initial is None else initial.tokenizer.vocab_size
    model = config.model_config(inputs.tokenizer.vocab_size if inputs else vocab_size, initial)
    workload = Workload.of(config, model, count_parameters(model), target.hardware)
    tokens = config.optim.steps * config.data.batch_tokens
    flops = workload.flops * config.optim.steps
    if inputs is None:
        data = missing + (" (GPT-2's vocabulary is assumed)" if initial is None else "")
    else:
        data = f"{describe_epochs(config, inputs)}, which is complete"
    lines = [
        f"model       {workload.n_parameters:,} parameters: {model.n_layer} layers, {model.n_head} heads, "
        f"{model.n_embd} channels, vocabulary {model.vocab_size:,}",
        f"data        {tokens:,} tokens, {config.optim.steps:,} steps of {config.data.batch_tokens:,}: {data}",
        *(f"            {note}" for note in (inputs.notes if inputs else [])),
        *([f"start       {absent}"] if absent else check_start(start, config, model, inputs)),
        f"compute     {flops / tokens / 1e6:,.1f} MFLOPs per token, {flops:.3g} FLOPs in total",
        *([f"rates       {describe_rates(config.optim, model)}"] if config.model.init_from == "scratch" else []),
        *describe_memory(config, workload, target),
        *describe_time(config, workload, target, flags.mfu),
        *(describe_expected_loss(config, model, inputs) if inputs else []),
    ]
    if inputs is not None:
        lines += [f"warning: {warning}" for warning in warnings(config, inputs)]
    return "\n".join(lines), "" if flags.dry_run else missing or absent


def find_start_alone(config: Config, processes: Processes) -> tuple[Start, str]:
    """Return where the run would start, and a message, which is "" unless the checkpoint that the run needs is missing.

    Unlike `find_start`, this function does not wait for other processes.
    """
    directory = Path(config.run.dir) / config.run.name / "checkpoints"
    try:
        return find_start(config, directory, Processes(0, 1, processes.device, processes.dtype)), ""
    except FileNotFoundError as error:
        # If the missing file is the model that model.init_from names, `choose_model` or `find_model` raises an error.
        model = choose_model(config, None)
        return Start(None, False, [], find_model(model) if model else None), str(error)


def check_start(start: Start, config: Config, model: GPTConfig, inputs: Inputs | None) -> list[str]:
    """Return lines about the checkpoint that the run would start from. Raises ValueError if the run cannot use it."""
    if start.checkpoint is None:
        return []
    if inputs is None:  # `run_identity` needs a dataset, so the run is not compared with the checkpoint
        saved, val_tokens = read_state(start.checkpoint), 0
    else:
        val_tokens = inputs.validation_tokens
        saved = read_saved_state(start, config, run_identity(config, model, inputs), val_tokens)
    found, *more = describe_start(start, saved, config.optim, val_tokens)
    remaining, steps = config.optim.steps - saved["step"], config.optim.steps
    return [f"start       {found}: {remaining:,} of {steps:,} steps remain", *(f"            {line}" for line in more)]


def find_target(config: Config, processes: Processes, name: str) -> Target:
    """Return the hardware that `name` describes, such as 8xH100, or that of this process if `name` is "".

    Raises ValueError if `name` has another form, or if the device is not in `device.CARDS`.
    """
    if not name:
        device, hardware = processes.device, Hardware.of(processes)
        free, part = usable_memory(device)
        full_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return Target(full_name, hardware, find_card(full_name), part * free)
    number, _, device_name = name.partition("x")
    count, card = int(number) if number.isdecimal() else 0, find_card(device_name)
    if count < 1 or card is None:
        raise ValueError(
            f"--dry-run {name}: expected a number and a device such as 8xH100, with one of {', '.join(CARDS)}"
        )
    dtype = card.dtype if config.system.dtype == "auto" else DTYPES[config.system.dtype]
    memory = card.memory * 2**30
    return Target(device_name, Hardware(count, dtype, memory, card.peak_flops), card, GPU_SHARE * memory)


def strategies(config: Config, count: int) -> dict[str, bool]:
    """Return the strategies that a run on `count` devices can use: {name: whether it shards the model}."""
    if count == 1:
        return {"one process": False}
    both = {"ddp": False, "fsdp": True}
    return both if config.system.parallel == "auto" else {config.system.parallel: both[config.system.parallel]}


def choose_micro_batch(config: Config, workload: Workload, target: Target, *, sharded: bool) -> int | None:
    """Return the windows per micro-batch on this hardware; None if data.micro_batch is auto and no window fits."""
    if config.data.micro_batch != "auto":
        return min(config.data.micro_batch, workload.windows)
    return workload.fit_rows(target.budget, sharded=sharded)


def describe_memory(config: Config, workload: Workload, target: Target) -> list[str]:
    """Return a table: the memory that each strategy and size of micro-batch needs, and whether it fits."""
    hardware, windows = target.hardware, workload.windows
    precision = str(hardware.dtype).removeprefix("torch.")
    lines = [f"memory      estimated MiB on each of {hardware.count} x {target.name}, {precision}"]
    header = ("strategy", "micro-batch", "weights", "gradients", "optimizer", "activations", "logits", "total")
    lines.append("".join(f"{name:>12}" for name in header) + f"  of {target.budget / 2**20:,.0f}")
    for name, sharded in strategies(config, hardware.count).items():
        chosen = choose_micro_batch(config, workload, target, sharded=sharded)
        is_auto = config.data.micro_batch == "auto"
        sizes = {2**i for i in range(windows.bit_length()) if 2**i <= 64} if is_auto else set()
        for rows in sorted(sizes | ({chosen} if chosen is not None else set())):
            needed = list(workload.memory(rows, sharded=sharded).values())
            verdict = "fits" if sum(needed) <= target.budget else "does not fit"
            if is_auto and rows == chosen:
                verdict += ": auto uses this"
            columns = "".join(f"{n / 2**20:>12,.0f}" for n in (*needed, sum(needed)))
            lines.append(f"{name:>12}{rows:>12}{columns}  {verdict}")
    return lines


def describe_time(config: Config, workload: Workload, target: Target, mfu: float | None) -> list[str]:
    """Return lines with the expected duration of a step and of the run, or one line that says why there is no estimate.

    `mfu` is the fraction of a GPU's peak FLOP/s to assume. If it is None, the lines also show each part of a step.
    """
    hardware, card, steps = target.hardware, target.card, config.optim.steps
    precision = str(hardware.dtype).removeprefix("torch.")
    peak = card.peak_in(hardware.dtype) if card else None
    if target.name == "cpu":
        seconds = seconds_on_cpu(workload)
        return [
            f"time        {duration(steps * seconds)}, {duration(seconds)} a step, assuming {CPU_SHARE:.0%} of the "
            f"rate of matrix products that was measured now"
        ]
    if card is None or peak is None:
        return [
            f"time        not estimated: the peak of {target.name} in {precision} is not known; name a device: "
            f"--dry-run 8xH100"
        ]
    if mfu is not None:
        seconds = workload.flops / (mfu * peak * hardware.count)
        return [
            f"time        {duration(steps * seconds)}, {duration(seconds)} a step, assuming {mfu:.0%} of "
            f"{peak / 1e12:,.0f} TFLOP/s on each (--mfu)"
        ]
    lines = ["time        estimated for each step in ms; only compared with one H200, where it was 2% to 5% too short"]
    header = ("strategy", "compute", "loss", "exposed comm", "optimizer", "evaluation", "total")
    lines.append("".join(f"{name:>13}" for name in header) + "   tokens/s      MFU   whole run")
    for name, sharded in strategies(config, hardware.count).items():
        rows = choose_micro_batch(config, workload, target, sharded=sharded)
        if rows is None:
            lines.append(f"{name:>13}  does not fit")
            continue
        step = estimate_step(config, workload, card, rows, sharded=sharded)
        assert step is not None
        columns = "".join(f"{1000 * seconds:>13,.1f}" for seconds in (*step, step.total))
        tokens_per_second = config.data.batch_tokens / step.total
        used = workload.flops / step.total / peak / hardware.count
        lines.append(f"{name:>13}{columns}{tokens_per_second:>11,.0f}{used:>9.0%}   {duration(steps * step.total)}")
    for words, project, rate in PUBLISHED:
        if find_card(words) is card:
            lines.append(f"published   {project} trains 124M at {rate:,} tokens/s on each {words}")
    return lines
