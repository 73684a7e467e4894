"""Mean cross-entropy of the output head, computed in chunks, so that the logits are never all in memory.

With GPT-2's vocabulary the logits are the largest tensor of a training step: for 64 sequences of 1,024 tokens, the
logits and their gradient take 13 GB each in float32. `linear_cross_entropy` computes a chunk of logits at a time, and
overwrites each chunk with its gradient before it computes the next one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

IGNORE_INDEX = -100  # targets with this value do not count, as in F.cross_entropy and transformers

# Maximum number of rows of logits in one chunk, except on CUDA. A CPU computes a product of 512 rows at full speed.
MATMUL_ROWS = 512

# The distance between rows of logits in memory is a multiple of this number of elements. GPT-2's vocabulary has an odd
# size, so otherwise most rows would begin in the middle of a cache line (64 bytes), and matrix products in float32
# would take up to a third longer.
ROW_MULTIPLE = 32


def plain_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The plain form that `linear_cross_entropy` must equal. It keeps all logits (N, V) for the backward pass."""
    total = F.cross_entropy(F.linear(x, weight), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the logits x weightᵀ, in nats, over the targets that are not IGNORE_INDEX.

    x (N, C), weight (V, C), targets (N,). If all targets are IGNORE_INDEX, the result is 0 instead of NaN. Under
    autocast, matrix products run in the dtype of autocast.

    Raises NotImplementedError in forward-mode differentiation, such as `torch.func.jvp`.
    """
    # A custom operator has no derivative in forward mode, and PyTorch would return zeros without an error.
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in (x, weight)):
        raise NotImplementedError(
            "linear_cross_entropy has no forward-mode derivative: compute the loss from the logits with "
            "torch.nn.functional.cross_entropy, or differentiate in reverse mode"
        )
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with_grad = torch.is_grad_enabled()
    total, _, _ = linear_cross_entropy_sum(
        x, weight, targets, dtype, with_grad and x.requires_grad, with_grad and weight.requires_grad
    )
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def centered_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the head (V, C) in `dtype`. In 16-bit precision, the mean row is subtracted from each row first.

    Subtracting the mean row shifts all logits of a position equally, so softmax is unchanged. The logits become
    smaller, and their rounding finer: the logits of the released GPT-2 lie near -80, where neighboring bfloat16 numbers
    are 0.5 apart.
    """
    if dtype.itemsize >= 4:
        return weight.to(dtype)
    head, mean = torch.empty_like(weight, dtype=dtype), weight.mean(dim=0, dtype=torch.float32)
    # Subtract in parts, because all differences in float32 would take as much memory as a second head.
    for part, rows in zip(head.split(2048), weight.split(2048), strict=True):
        part.copy_(rows - mean)
    return head


def loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, x_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss () in float32 and its gradients with respect to x (N, C) and weight (V, C).

    Matrix products run in `dtype`. A gradient that is not requested is an empty tensor.
    """
    total = x.new_zeros((), dtype=torch.float32)
    dx = torch.empty_like(x) if x_grad else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if weight_grad else weight.new_empty(0)
    head = centered_head(weight, dtype)
    # Compute softmax in float32, for `softmax_rows` rows at a time, so that the float32 copy needs little memory. On a
    # CPU, 64 rows nearly fit into the cache. On any other device, one kernel launch processes all rows of a chunk.
    softmax_rows, columns = (64, 8192) if x.device.type == "cpu" else (MATMUL_ROWS, len(weight))
    rows = min(MATMUL_ROWS, math.ceil(len(x) / 2))  # at most half of the batch, so that no tensor has all logits
    stride = math.ceil(len(weight) / ROW_MULTIPLE) * ROW_MULTIPLE
    buffer = head.new_empty(rows, stride)[:, : len(weight)]
    for first in range(0, len(x), rows or 1):
        chunk = slice(first, first + rows)
        x_rows = x[chunk].to(dtype)
        logits = torch.mm(x_rows, head.T, out=buffer[: len(x_rows)])
        counts = (targets[chunk] != IGNORE_INDEX).unsqueeze(1)
        target = targets[chunk].unsqueeze(1).clamp(min=0)
        for part, right, count in zip(*(t.split(softmax_rows) for t in (logits, target, counts)), strict=True):
            scores = part.float()
            highest, right_score = scores.amax(dim=-1, keepdim=True), scores.gather(1, right)
            p = torch.softmax(scores, dim=-1, out=scores)
            # The p of a target may round to 0, so the loss is log_sum - right_score and not -log p. log_sum, which is
            # log Σ exp(score), is computed from the highest score, whose p never rounds to 0.
            log_sum = highest - p.amax(dim=-1, keepdim=True).log()
            total += ((log_sum - right_score) * count).sum()
            if x_grad or weight_grad:
                # d loss / d logits = softmax - one-hot, written over the logits
                part.copy_(p.scatter_add_(1, right, torch.full_like(right_score, -1.0)))
        # Set the rows of ignored targets to 0 in dx and x_rows and not in logits, which is much larger.
        if x_grad:
            dx[chunk] = (logits @ head) * counts
        if weight_grad:
            x_rows = x_rows * counts
            # On a CPU, add in blocks of columns, so that no second tensor is as large as the weight.
            for block, gradient in zip(dweight.split(columns), logits.split(columns, dim=1), strict=True):
                add_product(block, gradient, x_rows)
    return total, dx, dweight.to(weight.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add aᵀ b to `total` (float32).

    Except on CUDA, float16 products are computed in float32, because a sum over many positions could exceed 65,504, the
    largest float16 number. Loss scaling does not prevent this: `_scale_gradients` multiplies by the scale later.
    """
    if a.is_cuda and torch.version.hip is None and a.dtype != total.dtype:
        # Only CUDA supports `out_dtype`, with which products of 16-bit tensors are added in float32 (ROCm does not).
        torch.addmm(total, a.T, b, out_dtype=total.dtype, out=total)
    elif torch.finfo(a.dtype).smallest_normal <= torch.finfo(torch.float32).smallest_normal:
        total += a.T @ b
    else:
        total.addmm_(a.T.float(), b.float())  # in place, because autocast would make a @ b a float16 product again


# This is a custom operator, so that torch.compile treats it as a single operation instead of unrolling its loop. It
# computes the gradients together with the loss, so the logits are neither stored nor computed again.
linear_cross_entropy_sum = torch.library.custom_op(
    "gpt2::linear_cross_entropy_sum", loss_and_gradients, mutates_args=()
)


@linear_cross_entropy_sum.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, x_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if x_grad else x.new_empty(0)
    dweight = torch.empty_like(weight) if weight_grad else weight.new_empty(0)
    return x.new_empty((), dtype=torch.float32), dx, dweight


def _save_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, ctx.x_grad, ctx.weight_grad = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, total_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Return the saved gradients times the gradient of the summed loss (the chain rule)."""
    dx, dweight = ctx.saved_tensors
    # Multiply in place, because dweight is as large as the head. This changes the saved tensors, so a second backward
    # pass through the same graph is an error. Under torch.compile, whose tensors have other types, multiply out of
    # place, because the compiler decides which memory to reuse.
    multiply = Tensor.mul_ if type(dx) is Tensor else Tensor.mul
    dx, dweight = multiply(dx, total_grad), multiply(dweight, total_grad)
    return (dx if ctx.x_grad else None, dweight if ctx.weight_grad else None, None, None, None, None)


linear_cross_entropy_sum.register_autograd(_scale_gradients, setup_context=_save_gradients)
