"""A decoding step with fixed shapes, which CUDA can replay as a graph.

A step of the 124M model consists of nearly 200 small operations. The host needs longer to queue them than a GPU needs
to run them. A CUDA graph queues all of them with one call. The graph repeats the same operations at the same memory
addresses, so no shape and no argument may change from step to step. Therefore the position of the new token is a tensor
on the device, and attention always reads the whole cache. A mask hides the part that is not filled yet.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model import GPT, KVCache


class FixedLayerCache(NamedTuple):
    """One layer of a KVCache, with the current length in a tensor on the device.

    It replaces `model.LayerCache`, whose lengths are numbers on the host: a CUDA graph would not update them.
    """

    keys: Tensor  # (N, H, max_length, D)
    values: Tensor  # (N, H, max_length, D)
    position: Tensor  # (1,), index at which the next key and value are written

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (N, H, 1, D) at `position`. Return all keys and all values, (N, H, max_length, D) each."""
        self.keys.index_copy_(2, self.position, k.to(self.keys.dtype))
        self.values.index_copy_(2, self.position, v.to(self.values.dtype))
        return self.keys.to(k.dtype), self.values.to(v.dtype)


class FixedStep:
    """A step that reads one more token of each row. Its state is in tensors that keep their shapes and addresses.

    With `capture`, the first call runs the operations one by one, so that libraries such as cuBLAS initialize
    themselves before the capture. The second call captures a CUDA graph, which this call and all later ones replay.
    Without `capture`, or if capturing fails, all calls run the operations one by one.
    """

    def __init__(
        self, model: GPT, cache: KVCache, mask: Tensor | None, head: Callable[[Tensor], Tensor], *, capture: bool
    ) -> None:
        """Continue after the tokens that `cache` holds.

        Args:
            mask: (N, S), 0 for padding, or None if no row is padded. S is at least the number of tokens in `cache`.
            head: the function that computes logits (N, V) from hidden states (N, C).
        """
        weight, past, rows = model.transformer.wte.weight, cache.length, cache.batch_size
        device = weight.device
        self.model, self.cache, self.head, self.capture = model, cache, head, capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = torch.full((1,), past, device=device)
        self.layers = [FixedLayerCache(k, v, self.position) for k, v in zip(cache.keys, cache.values, strict=True)]
        read = torch.ones(rows, past, dtype=torch.bool, device=device) if mask is None else mask[:, :past].bool()
        # The index of a new token's position embedding: the number of tokens before it in its row, without padding.
        self.position_ids = read.sum(dim=1, keepdim=True)  # (N, 1)
        # self.mask holds 0 and -inf, which attention adds to its scores. A mask of booleans would be converted to these
        # numbers in every layer.
        enabled = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if enabled else weight.dtype
        self.mask = torch.full((rows, 1, 1, cache.max_length), float("-inf"), dtype=dtype, device=device)
        self.mask[:, 0, 0, :past].masked_fill_(read, 0.0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Add one token of each row to the cache: `tokens` (N, 1). Return the logits (N, V) of the next tokens."""
        self.tokens.copy_(tokens)
        if self.capture and self.warm and self.graph is None:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        elif self.capture:
            on_capture_stream(self._run, self.tokens.device)
        else:
            self._run()
        self.warm = True
        self.cache.length += 1
        return self.logits.clone()  # the next step may overwrite self.logits

    def _run(self) -> None:
        """Run the operations of a step. Position, mask and cache are updated in place."""
        transformer = self.model.transformer
        self.mask.index_fill_(3, self.position, 0.0)  # unmask the new token, for this step and all later ones
        x = transformer.wte(self.tokens) + transformer.wpe(self.position_ids)  # (N, 1, C)
        for block, layer in zip(transformer.h, self.layers, strict=True):
            x, _ = block(x, self.mask, None, layer)
        self.logits = self.head(transformer.ln_f(x)[:, -1])
        self.position += 1
        self.position_ids += 1

    def _capture(self) -> None:
        """Capture the operations of `_run` without executing them. If this fails, print the reason and do not retry."""
        try:
            self.graph = capture_graph(self._run, self.tokens.device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"decoding without a CUDA graph, which is slower: {reason}", file=sys.stderr)
            self.capture = False


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that all captures on a device share. cuBLAS would keep memory for each additional stream."""
    return torch.cuda.Stream(device)


def on_capture_stream(run: Callable[[], None], device: torch.device) -> None:
    """Call `run` on the capture stream, after the earlier and before the later work of the current stream."""
    stream, current = capture_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
    current.wait_stream(stream)


def capture_graph(run: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of the operations that `run` queues. Raises RuntimeError if one of them cannot be captured.

    `torch.cuda.graph` is not used here, because it would also empty the memory allocator's cache, which slows training.
    The error mode "thread_local" lets other threads, such as the data loader's, use CUDA during the capture.
    """
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()

    on_capture_stream(capture, device)
    return graph
