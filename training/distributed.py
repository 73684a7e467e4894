"""Distributed and compiled training with PyTorch's DDP, FSDP2 and torch.compile: the few calls that the loop needs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model import GPT
from processes import Processes


class Loss(nn.Module):
    """(inputs, targets) -> mean loss: the only function of a model that is compiled and distributed.

    Evaluation and sampling call the GPT itself, which has the same weights. So they neither recompile the function nor
    synchronize gradients.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the mean loss () over the targets (B, T) that are not IGNORE_INDEX; inputs and documents (B, T)."""
        loss = self.model(inputs, targets=targets, document_ids=documents).loss
        assert loss is not None
        return loss


class CompiledLoss(nn.Module):
    """A `Loss` that is compiled at its first call. If compiling fails, it prints a warning and runs uncompiled."""

    def __init__(self, loss: Loss) -> None:
        from torch._dynamo.exc import TorchDynamoException  # imported here: it takes a second, and few runs compile

        super().__init__()
        self.loss, self._cannot_compile = loss, TorchDynamoException
        self._compiled: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = torch.compile(
            loss.forward, dynamic=False
        )

    def forward(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return what `Loss` returns."""
        if self._compiled is not None:
            try:
                return self._compiled(inputs, targets, documents)
            # Errors of Dynamo, Inductor and its C++ compiler. Errors of the model itself are not caught.
            except self._cannot_compile as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(
                    f"compiling failed, training continues with PyTorch's own operators, which is slower: {reason}",
                    file=sys.stderr,
                )
                self._compiled = None
        return self.loss(inputs, targets, documents)


def distribute(
    model: GPT,
    processes: Processes,
    *,
    compiled: bool,
    sharded: bool,
    sequence_length: int,
    activation_checkpointing: bool = False,
) -> nn.Module:
    """Return the model's `Loss`, compiled and distributed over all processes. The GPT keeps its parameter names.

    Args:
        compiled: compile the loss with torch.compile.
        sharded: use FSDP2, which divides parameters and optimizer state between processes; otherwise DDP.
        sequence_length: tokens per window, for one backward pass that DDP needs before training.
        activation_checkpointing: compute the activations of each block again in the backward pass.
    """
    if activation_checkpointing:
        for block in model.transformer.h:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if sharded:
        # imported here: it takes a second, and few runs shard
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # The matrices of the blocks, which autocast would convert, are gathered in the reduced dtype. Everything else,
        # and with it the residual stream, is float32. So the results are those of DDP.
        reduced = processes.dtype if processes.dtype != torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.transformer.h:
            for norm in (module for module in block.children() if isinstance(module, nn.LayerNorm)):
                fully_shard(norm)
            fully_shard(block, mp_policy=policy)
        fully_shard(model)
    loss: nn.Module = CompiledLoss(Loss(model)) if compiled else Loss(model)
    if processes.world_size > 1 and not sharded:
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
        # DDP sums the gradients of the processes in one order in its first backward pass, and in another order in all
        # later ones. The result of one pass is discarded here, so that a resumed run uses the same order as a run that
        # was never stopped.
        ids = torch.zeros(1, sequence_length, dtype=torch.long, device=processes.device)
        with processes.autocast(), torch.compiler.set_stance("force_eager"):
            loss(ids, ids).backward()
        model.zero_grad()
    return loss


def synchronize_gradients(loss: nn.Module, model: Any, enabled: bool) -> None:
    """Set whether the next backward pass averages gradients over the processes."""
    if isinstance(loss, DistributedDataParallel):
        loss.require_backward_grad_sync = enabled
    elif hasattr(model, "set_requires_gradient_sync"):  # a method that FSDP2 adds
        model.set_requires_gradient_sync(enabled)


def free_gathered_weights(model: GPT) -> None:
    """Shard the weights again after forward passes that no backward pass follows.

    FSDP2 keeps gathered weights for the backward pass, and `model.parameters()` would return them instead of the
    shards.
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
