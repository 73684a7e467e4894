"""Validation during training: loss, HellaSwag and sampled texts. All processes share the work."""

from __future__ import annotations

import math
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch

from eval.hellaswag import hellaswag
from eval.loss import SplitLoss, joined, split_loss
from generation import generate
from training.distributed import free_gathered_weights
from training.setup import TrainingRun

SAMPLE_TOKENS = 200


class Validation(NamedTuple):
    """The results of a validation, the same on all processes except `texts`."""

    loss: SplitLoss
    parts: dict[str, SplitLoss]  # of each dataset, only if there are several
    hellaswag: dict[str, Any] | None  # None unless eval.hellaswag is set
    texts: list[str]  # samples; only the main process's are used


def measure(run: TrainingRun) -> Validation:
    """Score the validation split and HellaSwag, and sample texts. The model is in training mode before and after."""
    config, processes, model, inputs = run.config, run.processes, run.model, run.inputs
    assert inputs.val  # open_inputs refuses eval.every without a validation split
    model.eval()
    losses = {
        name: split_loss(
            model,
            windows,
            inputs.tokenizer.token_bytes(),
            micro_batch=run.plan.micro_batch,
            rank=processes.rank,
            world_size=processes.world_size,
            reduce=processes.all_reduce_sum,
            autocast=processes.autocast,
        )
        for name, windows in inputs.val.items()
    }
    loss = joined(losses.values()) if len(losses) > 1 else next(iter(losses.values()))
    answers = None
    if config.eval.hellaswag:
        with processes.autocast():
            answers = hellaswag(
                model,
                inputs.tokenizer,
                rank=processes.rank,
                world_size=processes.world_size,
                reduce=processes.all_reduce_sum,
            )
    # Nothing can be sampled from weights that are not finite. Under FSDP all processes take part in a forward pass, so
    # all of them sample, and only the main process writes its texts.
    finite = math.isfinite(loss.loss)
    texts = sample_texts(run) if finite and (processes.is_main or run.plan.sharded) else []
    free_gathered_weights(model)
    model.train()
    return Validation(loss, losses if len(losses) > 1 else {}, answers, texts)


def sample_texts(run: TrainingRun) -> list[str]:
    """Sample eval.samples texts that start with end-of-text, or that continue prompts of the validation split.

    The seed is the same at each validation, so that the texts show how the model changes.
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
