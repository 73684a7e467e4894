"""The loss of kernels/loss.py in the form that suits a GPU: few large products, and one fused pass over the logits.

This form differs from the form for a CPU in four points:

- The products use a copy of the head that is padded to a multiple of 128 rows. The size of GPT-2's vocabulary, 50,257,
  is odd, so without padding the rows of 16-bit logits would not be aligned, and the products would run on slow kernels.
- Thousands of rows of logits are computed at a time, because small matrix products cannot keep a GPU busy.
- Everything between the products is one function for `torch.compile`, which fuses its operations. Separate operators
  would read and write the logits several more times.
- The matrix products themselves add to the head's gradient in float32, without a separate addition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.compiled import Compiled
from kernels.loss import IGNORE_INDEX, add_product, centered_head, linear_cross_entropy_sum

# The number of rows of the padded head (50,304 for GPT-2) is a multiple of this number. Tensor cores need a multiple of
# 8, and their tiles are 128 wide.
HEAD_MULTIPLE = 128
# Minimum and maximum number of rows of logits in memory at a time. More than 8,192 make the products hardly faster.
FEWEST_ROWS, MOST_ROWS = 512, 8192
LOGITS_SHARE = 0.01  # fraction of a GPU's memory for the logits; FEWEST_ROWS rows are allowed to need more


def softmax_gradient(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the summed loss () in float32, and overwrite the logits with their gradient.

    logits is (rows, padded vocabulary) in any dtype, targets is (rows,). Columns from `vocab_size` on are padding: they
    have no probability, and their gradient is 0. A row whose target is IGNORE_INDEX has no loss and a gradient of 0. If
    a target is neither IGNORE_INDEX nor a token of the vocabulary, the loss is NaN.
    """
    columns = torch.arange(logits.size(1), device=logits.device)
    scores = logits.float().masked_fill(columns >= vocab_size, float("-inf"))
    counts = (targets != IGNORE_INDEX).unsqueeze(1)
    one_hot = columns == targets.unsqueeze(1)
    log_sum = scores.logsumexp(dim=1, keepdim=True)
    # Select each target's score by a sum over the row. With a gather, the compiled function is 11% slower on an H200.
    target_score = torch.where(one_hot, scores, 0.0).sum(dim=1, keepdim=True)
    # A target outside the vocabulary has no column. Make the loss NaN, so that the error is noticed.
    outside = ((targets < 0) | (targets >= vocab_size)).unsqueeze(1)
    total = torch.where(counts, (log_sum - target_score).masked_fill(outside, float("nan")), 0.0).sum()
    logits.copy_(((scores - log_sum).exp() - one_hot.float()) * counts)
    return total


@functools.cache
def compiled_softmax_gradient() -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return `softmax_gradient` as one fused kernel, compiled at its first call."""
    return Compiled(softmax_gradient, "the loss", dynamic=None)


def rows_at_a_time(device_memory: int, vocab_size: int, itemsize: int) -> int:
    """Return how many rows of logits to hold at a time on a device with this many bytes of memory: a power of two.

    The number depends on the size of the memory and not on how much of it is free now, because a resumed run must sum
    the head's gradient in the same order.
    """
    rows = int(device_memory * LOGITS_SHARE) // (padded(vocab_size) * itemsize)
    return min(MOST_ROWS, max(FEWEST_ROWS, 1 << max(0, rows.bit_length() - 1)))


@functools.cache
def device_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU. For any other device, which only tests use here, return 16 GiB."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**34


def padded(vocab_size: int) -> int:
    """Return the number of rows of the padded head: `vocab_size`, rounded up to a multiple of HEAD_MULTIPLE."""
    return math.ceil(vocab_size / HEAD_MULTIPLE) * HEAD_MULTIPLE


def cuda_loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, x_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same results as `kernels.loss.loss_and_gradients`. Any device can run this form; tests use a CPU."""
    vocab_size, n_channels = weight.shape
    head = weight.new_zeros(padded(vocab_size), n_channels, dtype=dtype)
    head[:vocab_size] = centered_head(weight, dtype)
    total = x.new_zeros((), dtype=torch.float32)
    dx = torch.empty_like(x) if x_grad else x.new_empty(0)
    dhead = torch.zeros_like(head, dtype=torch.float32) if weight_grad else x.new_empty(0)
    # The rows are divided into parts whose sizes differ by at most one row, so that the compiled function is called
    # with few shapes. An empty batch is one part, because `tensor_split` needs at least one part.
    parts = max(1, math.ceil(len(x) / rows_at_a_time(device_memory(x.device), vocab_size, dtype.itemsize)))
    for x_rows, part_targets, part_dx in zip(
        x.tensor_split(parts), targets.tensor_split(parts), (dx if x_grad else x).tensor_split(parts), strict=True
    ):
        x_rows = x_rows.to(dtype)
        logits = x_rows @ head.T  # (rows, padded vocabulary): the row stride is a multiple of 128 elements
        total += compiled_softmax_gradient()(logits, part_targets, vocab_size)
        # `logits` now holds the gradient with respect to the logits, with rows of zeros for ignored targets.
        if x_grad:
            part_dx.copy_(logits @ head)
        if weight_grad:
            add_product(dhead, logits, x_rows)
    return total, dx, dhead[:vocab_size].to(weight.dtype) if weight_grad else x.new_empty(0)


linear_cross_entropy_sum.register_kernel("cuda", cuda_loss_and_gradients)
