"""Distributed and compiled training with PyTorch's DDP, FSDP2 and torch.compile: the few calls that the loop needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kernels.compiled import Compiled
from model import GPT, Block
from processes import Processes


class Loss(nn.Module):
    """The mean loss of a model as a module of its own, which `distribute` compiles and distributes for training.

    Evaluation and sampling call the GPT itself, uncompiled and without synchronization of gradients.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the mean loss () over the targets that are not IGNORE_INDEX. All arguments are (B, T)."""
        loss = self.model(inputs, targets=targets, document_ids=documents).loss
        assert loss is not None
        return loss


def recomputing_forward(block: Block, *inputs: Any) -> Any:
    """Run `Block.forward`, and keep only its inputs for the backward pass, which computes the activations again."""
    return checkpoint(functools.partial(Block.forward, block), *inputs, use_reentrant=False)


def compile_blocks(model: GPT, forward: Callable[..., Any]) -> None:
    """Compile `forward`, the forward pass of a block, for training. Only the blocks are compiled here.

    Blocks are compiled one by one, because they are also the units of communication. FSDP gathers the weights of a
    block in hooks that cannot be part of a graph. DDP averages gradients during the backward pass, but a single graph
    of the whole model would return all gradients at its end. In eval mode, where shapes vary, blocks run uncompiled.
    """
    # imported here: the import takes a second, and only compiled runs on several processes need it
    import torch._dynamo.config as dynamo_config

    dynamo_config.optimize_ddp = False  # True would split a block's graph at the borders of DDP's buckets
    compiled = Compiled(forward, "the blocks")  # one for all blocks, which share the code compiled for the first

    def run(block: Block, *inputs: Any) -> Any:
        return (compiled if block.training else Block.forward)(block, *inputs)

    block: Any
    for block in model.transformer.h:
        block.forward = functools.partial(run, block)


def shard(model: GPT, dtype: torch.dtype) -> None:
    """Divide parameters, gradients and optimizer state between all processes with FSDP2.

    The linear layers of each block are gathered in `dtype`, the precision to which autocast converts them anyway. All
    other parameters are gathered together, because each LayerNorm is too small for a collective operation of its own.
    They are gathered in float32, so that the results are the same as with DDP.
    """
    # imported here: the import takes a second, and few runs shard
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks = model.transformer.h
    matrices = {
        p
        for block in blocks
        for linear in block.modules()
        if isinstance(linear, nn.Linear)
        for p in linear.parameters()
    }
    fully_shard(model, ignored_params=matrices)
    others = {p for block in blocks for p in block.parameters()} - matrices
    reduced = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=policy, ignored_params=others)


def distribute(
    model: GPT,
    processes: Processes,
    *,
    compiled: bool,
    sharded: bool,
    sequence_length: int,
    activation_checkpointing: bool = False,
) -> nn.Module:
    """Return the model's `Loss`, compiled if requested, and distributed if there are several processes.

    The names of the GPT's parameters do not change.

    Args:
        compiled: use torch.compile, for the whole loss on one process and for each block on several.
        sharded: use FSDP2, which divides parameters and optimizer state between processes; otherwise DDP.
        sequence_length: tokens per window, for one backward pass that DDP needs before training.
        activation_checkpointing: compute the activations of each block again in the backward pass.
    """
    loss: nn.Module = Loss(model)
    forward = recomputing_forward if activation_checkpointing else Block.forward
    block: Any
    if activation_checkpointing:
        for block in model.transformer.h:
            block.forward = functools.partial(forward, block)
    if compiled and processes.world_size == 1 and not sharded:
        loss.forward = Compiled(loss.forward, "the loss")  # one graph: operations are fused across blocks
    elif compiled:
        compile_blocks(model, forward)
    if sharded:
        shard(model, processes.dtype)
    elif processes.world_size > 1:
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
        # DDP sums gradients in one order in its first backward pass, and in another order in all later ones. So discard
        # the first pass here. Otherwise, the first step after resuming would differ from that of an uninterrupted run.
        ids = torch.zeros(1, sequence_length, dtype=torch.long, device=processes.device)
        with processes.autocast(), torch.compiler.set_stance("force_eager"):
            loss(ids, ids).backward()
        model.zero_grad()
    return loss


def synchronize_gradients(loss: nn.Module, model: Any, enabled: bool) -> None:
    """Set whether the next backward pass averages gradients over the processes. With one process, do nothing."""
    if isinstance(loss, DistributedDataParallel):
        loss.require_backward_grad_sync = enabled
    elif hasattr(model, "set_requires_gradient_sync"):  # a method that FSDP2 adds
        model.set_requires_gradient_sync(enabled)


def free_gathered_weights(model: GPT) -> None:
    """Shard the weights again after forward passes that were not followed by a backward pass.

    After a forward pass, FSDP2 keeps the gathered weights for the backward pass. Until they are sharded again,
    `model.parameters()` would return them instead of the shards.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):  # a method that FSDP2 adds
            module.reshard()


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient to a norm of at most `max_norm`; 0 means no limit. Return the norm () before scaling.

    The norm stays on the device, so that the host does not wait for it.
    """
    norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2's norm is a sharded tensor
