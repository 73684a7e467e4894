"""Validation during training: loss, HellaSwag and sampled texts. All processes share the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch

from data.loader import Windows
from eval.hellaswag import hellaswag
from eval.loss import SplitLoss, joined, split_loss
from generation import generate
from model import GPT
from training.config import Config
from training.distributed import free_gathered_weights
from training.launch import StopSignal
from training.setup import TrainingRun

SAMPLE_TOKENS = 200


class Validation(NamedTuple):
    """The results of a validation, the same on all processes except `texts`."""

    loss: SplitLoss
    parts: dict[str, SplitLoss]  # by dataset; empty if there is only one dataset
    final: (
        SplitLoss | None
    )  # over eval.final_tokens tokens, after the last step; None at other steps, or without this field
    hellaswag: dict[str, Any] | None  # None if it was not scored
    texts: list[str]  # samples; only the main process's are used


class Interrupted(Exception):
    """A stop was requested during the validation."""


@contextmanager
def interrupt_if(model: GPT, stop_requested: Callable[[], bool]) -> Iterator[None]:
    """In the `with` block, call `stop_requested` before each forward pass; if it returns True, raise Interrupted."""

    def check(*arguments: object) -> None:
        if stop_requested():
            raise Interrupted

    hook = model.register_forward_pre_hook(check, prepend=True)  # first, before FSDP gathers the weights
    try:
        yield
    finally:
        hook.remove()


def measure(run: TrainingRun, signal: StopSignal) -> Validation | None:
    """Score the validation split and HellaSwag, and generate texts. If a stop is requested before the end, return None.

    All processes score with the same number of forward passes, and agree before each pass whether to continue. The
    model is in training mode before and after this function.
    """
    processes, model = run.processes, run.model

    def stop_requested() -> bool:  # True on all processes if any of them was asked to stop
        return processes.all_reduce_min(int(not signal.received)) == 0

    model.eval()
    try:
        with interrupt_if(model, stop_requested):
            loss, parts, final = score_split(run)
            answers = score_hellaswag(run)
        # With FSDP, a forward pass needs all processes, so all of them sample. Otherwise, only the main process does.
        texts: list[str] = []
        if math.isfinite(loss.loss) and (processes.is_main or run.plan.sharded):
            requested = stop_requested if run.plan.sharded else lambda: signal.received
            with suppress(Interrupted), interrupt_if(model, requested):
                texts = sample_texts(run)
        return None if stop_requested() else Validation(loss, parts, final, answers, texts)
    except Interrupted:
        return None
    finally:
        free_gathered_weights(model)
        model.train()


def score_split(run: TrainingRun) -> tuple[SplitLoss, dict[str, SplitLoss], SplitLoss | None]:
    """Return the loss on eval.tokens, the loss of each dataset of a mixture, and the loss on eval.final_tokens.

    The dict with the losses of the datasets is empty if there is only one dataset. The loss on eval.final_tokens is
    None before the last step, or if the setting is null. It is computed in a separate pass, so it equals, bit for bit,
    the loss of a validation with this number of eval.tokens.
    """
    assert run.inputs.val  # `open_inputs` raises an error if there is no validation data
    losses = split_losses(run, run.inputs.val)
    is_last = run.state.step == run.config.optim.steps
    final = split_losses(run, run.inputs.final_val) if is_last else {}
    parts = losses if len(losses) > 1 else {}
    return joined(losses.values()), parts, joined(final.values()) if final else None


def split_losses(run: TrainingRun, val: dict[str, Windows]) -> dict[str, SplitLoss]:
    """Return the loss on the validation windows of each dataset."""
    processes = run.processes
    return {
        name: split_loss(
            run.model,
            windows,
            run.inputs.tokenizer.token_bytes(),
            micro_batch=run.plan.micro_batch,
            rank=processes.rank,
            world_size=processes.world_size,
            reduce=processes.all_reduce_sum,
            autocast=processes.autocast,
        )
        for name, windows in val.items()
    }


def score_hellaswag(run: TrainingRun) -> dict[str, Any] | None:
    """Return HellaSwag's results, or None if eval.hellaswag is not set or this validation does not include it."""
    processes = run.processes
    if not (run.config.eval.hellaswag and hellaswag_is_due(run.state.step, run.config)):
        return None
    with processes.autocast():
        return hellaswag(
            run.model,
            run.inputs.tokenizer,
            rank=processes.rank,
            world_size=processes.world_size,
            reduce=processes.all_reduce_sum,
        )


def hellaswag_is_due(step: int, config: Config) -> bool:
    """Return whether this validation is the last one, or the first at or after a multiple of eval.hellaswag_every."""
    every, previous = config.eval.hellaswag_every, step - config.eval.every
    return step == config.optim.steps or step // every > previous // every


def sample_texts(run: TrainingRun) -> list[str]:
    """Sample eval.samples texts. Each text continues a prompt.

    With data.format completions, the prompts are those of the validation split. With data.format tokens, the only
    prompt is the end-of-text token. The seed is the same at each validation, so that the texts show how the model
    changes. Only the last block_size / 2 tokens of a prompt are used, so that there is room for new tokens.
    """
    n, block_size, tokenizer = run.config.eval.samples, run.model.config.block_size, run.inputs.tokenizer
    if n == 0:
        return []
    prompts = [prompt[-(block_size // 2) :] for prompt in islice(cycle(run.inputs.prompts), n)]
    generator = torch.Generator(run.processes.device).manual_seed(run.config.run.seed)
    with run.processes.autocast():
        ids = generate(
            run.model,
            prompts,
            max_new_tokens=min(SAMPLE_TOKENS, block_size - max(map(len, prompts))),
            do_sample=True,
            top_k=min(50, run.model.config.vocab_size),
            eos_token_id=tokenizer.eot,
            generator=generator,
        )
    assert isinstance(ids, torch.Tensor)
    return [tokenizer.decode([i for i in row if i != tokenizer.eot]) for row in ids.tolist()]
