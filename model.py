"""GPT-2 from top to bottom: configuration, attention, block, model, loss, cache. Files are read in weights.py.

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", as OpenAI's
code has it (https://github.com/openai/gpt-2/blob/master/src/model.py). Parameters carry the names they have in Hugging
Face transformers, so that a model saved here is a GPT-2 to every other tool.

Shapes: B sequences of T tokens, C = n_embd channels, H heads of D = C / H channels, S tokens attended to (those in the
cache and the T new ones), V = vocab_size, L = n_layer; M tokens of an encoder's output.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from weights import load_weights, locate, read_config, save_weights

IGNORE_INDEX = -100  # a target that does not count, as in F.cross_entropy and transformers

PRESETS = {  # layers, heads, width
    "gpt2": (12, 12, 768),  # 124,439,808 parameters
    "gpt2-medium": (24, 16, 1024),  # 354,823,168
    "gpt2-large": (36, 20, 1280),  # 774,030,080
    "gpt2-xl": (48, 25, 1600),  # 1,557,611,200
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. An impossible value is a ValueError that names the field."""

    vocab_size: int = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
    block_size: int = 1024  # longest sequence, in tokens: the number of learned positions
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # after the embeddings, on attention weights and on each residual branch
    cross_attention: bool = False  # a second attention in each block, over an encoder's output
    causal: bool = True  # False: each token sees the whole sequence (encoder use)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")

    @classmethod
    def preset(cls, name: str) -> GPTConfig:
        """The configuration of a released GPT-2: `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
        n_layer, n_head, n_embd = PRESETS[name]
        return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


class GPTOutput(NamedTuple):
    """What a forward pass returns; what was not asked for is None."""

    loss: Tensor | None = None  # (), mean over the targets that count, in nats
    logits: Tensor | None = None  # (B, T, V), or (B, k, V) with logits_to_keep=k
    last_hidden_state: Tensor | None = None  # (B, T, C), after ln_f
    hidden_states: tuple[Tensor, ...] | None = None  # L + 1 of (B, T, C): embeddings, after each block, last after ln_f
    attentions: tuple[Tensor, ...] | None = None  # L of (B, H, T, S)
    cache: KVCache | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Attention(nn.Module):
    """softmax(q kᵀ / √D) v (Vaswani et al. 2017, equation 1) in each of H heads.

    With `cross`, keys and values come from an encoder's output, as in transformers' `add_cross_attention`.
    """

    def __init__(self, config: GPTConfig, cross: bool = False) -> None:
        super().__init__()
        self.n_head, self.dropout, self.causal = config.n_head, config.dropout, config.causal and not cross
        if cross:
            self.q_attn = nn.Linear(config.n_embd, config.n_embd)
        self.c_attn = nn.Linear(config.n_embd, (2 if cross else 3) * config.n_embd)  # all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        mask: Tensor | None,  # (B or 1, 1, T or 1, S) booleans, True where a query may look; None: `causal` decides
        head_mask: Tensor | None = None,  # (H,)
        layer_cache: LayerCache | None = None,
        memory: Tensor | None = None,  # (B, M, C)
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if memory is None:
            q, k, v = self.c_attn(x).chunk(3, dim=-1)
        else:
            q, (k, v) = self.q_attn(x), self.c_attn(memory).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, T or M, D)
        if layer_cache is not None:
            k, v = layer_cache.append(k, v)  # (B, H, S, D)
        is_causal = self.causal and mask is None and q.size(2) > 1  # one query sees all there is
        dropout = self.dropout if self.training else 0.0
        weights = None
        if head_mask is None and not output_weights:
            # flash attention where there is a kernel for it: the (T, S) weights are never written to memory
            if is_causal and not dropout and x.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
                y = CausalAttention.apply(q, k, v)  # the same, with a faster backward pass
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
            if is_causal:
                mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).tril()
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            weights = F.dropout(scores.softmax(dim=-1), dropout)
            if head_mask is not None:
                weights = weights * head_mask.view(-1, 1, 1)
            y = weights.to(v.dtype) @ v
        return self.c_proj(y.transpose(1, 2).flatten(2)), weights if output_weights else None


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        if not self.training:
            return self._project(h)
        # what GELU gives, 4C wide, is cheaper to compute again in the backward pass than to keep for it
        return checkpoint(self._project, h, use_reentrant=False, preserve_rng_state=False)

    def _project(self, h: Tensor) -> Tensor:
        return self.c_proj(gelu(h))


def gelu(x: Tensor) -> Tensor:
    """x/2 (1 + tanh u), u = √(2/π) (x + 0.044715 x³), as OpenAI's code has it (Hendrycks and Gimpel 2016).

    The erf form differs from it by up to 5e-4 and breaks parity.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # (1 + tanh u)/2 is sigmoid(2u), and the compiler's kernel for that takes half the time of tanh's on a CPU
    z = x.float()
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)
    return (z * torch.sigmoid(2 * u)).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        if config.cross_attention:
            self.crossattention = Attention(config, cross=True)
            self.ln_cross_attn = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        layer_cache: LayerCache | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,  # (B, 1, 1, M)
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attn(self.ln_1(x), mask, head_mask, layer_cache, output_weights=output_weights)
        x = x + self.dropout(y)
        if memory is not None:
            x = x + self.dropout(self.crossattention(self.ln_cross_attn(x), memory_mask, memory=memory)[0])
        return x + self.dropout(self.mlp(self.ln_2(x))), weights


class Transformer(nn.Module):
    """The parts that `GPT.forward` puts together; a class of its own for the names, `transformer.wte` and so on."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # token embeddings and, transposed, the output head
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # learned positions
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)


def check_shape(what: str, tensor: Tensor, *expected: tuple[int | str, ...]) -> None:
    """ValueError unless the tensor has one of the shapes; a letter in a shape stands for any size."""
    for shape in expected:
        if len(shape) == tensor.dim() and all(
            isinstance(n, str) or n == m for n, m in zip(shape, tensor.shape, strict=True)
        ):
            return
    shapes = " or ".join(str(shape).replace("'", "") for shape in expected)
    raise ValueError(f"{what} has shape {tuple(tensor.shape)}, expected {shapes}")


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), biases zero, and projections onto the residual stream scaled by 1/√(2L),
        so that the sum of the 2L branches keeps its variance whatever the depth (GPT-2 paper, section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:  # LayerNorm
                nn.init.ones_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        cache: KVCache | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_logits: bool | None = None,
        logits_to_keep: int = 0,
    ) -> GPTOutput:
        """One pass over T tokens of B sequences, after the `past` tokens that the cache holds.

        Args:
            input_ids: (B, T) token ids; or else `inputs_embeds`: (B, T, C), in place of the token embeddings.
            targets: (B, T) ids aligned with the inputs (the token that follows each), IGNORE_INDEX where none counts.
            labels: (B, T) ids to be shifted here (usually the inputs themselves), as transformers does.
            attention_mask: (B, past + T), 1 for a token to keep and 0 for padding.
            position_ids: (B, T) or (T,). Without them positions count from the cache's length or, with an attention
                mask, over the kept tokens of each row, so that a left-padded row gets what it would get alone.
            head_mask: (H,) or (L, H), multiplies the attention weights.
            cache: keys and values seen so far, from `new_cache`; the new ones are appended. No gradient goes through.
            encoder_hidden_states, encoder_attention_mask: (B, M, C) and (B, M), for a model with cross_attention.
            return_logits: None gives logits only when there is no loss.
            logits_to_keep: k > 0 computes logits of the last k positions only.

        Raises:
            ValueError: on a wrong combination, shape, length or id, with the numbers in it. Looking at ids costs a host
                read, so that is done on CPU and in eval mode only, and never inside torch.compile.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds is needed, got {given}")
        if input_ids is not None:
            check_shape("input_ids", input_ids, ("B", "T"))
            self.check_ids("input_ids", input_ids, config.vocab_size, "vocab_size")
            inputs_embeds = self.transformer.wte(input_ids)
        assert inputs_embeds is not None
        check_shape("inputs_embeds", inputs_embeds, ("B", "T", config.n_embd))
        B, T, _ = inputs_embeds.shape
        past = cache.length if cache is not None else 0
        if not 0 < T <= config.block_size - past:
            raise ValueError(f"{past} cached + {T} new tokens, expected 1 to block_size {config.block_size} in all")
        if attention_mask is not None:
            check_shape("attention_mask (batch, past + new tokens)", attention_mask, (B, past + T))
        if targets is not None and labels is not None:
            raise ValueError("targets (aligned) and labels (shifted here) exclude each other, got both")
        if labels is not None:
            check_shape("labels", labels, (B, T))
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # t predicts t + 1; nothing follows the last
        if targets is not None:
            check_shape("targets", targets, (B, T))
            real_targets = targets.masked_fill(targets == IGNORE_INDEX, 0)
            self.check_ids("targets", real_targets, config.vocab_size, "vocab_size")

        # ---- token and position embeddings
        if position_ids is not None:
            check_shape("position_ids", position_ids, (B, T), (T,))
            self.check_ids("position_ids", position_ids, config.block_size, "block_size")
        elif attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]
        else:
            position_ids = torch.arange(past, past + T, device=inputs_embeds.device)
        x = self.transformer.drop(inputs_embeds + self.transformer.wpe(position_ids))

        # ---- who may look at whom
        mask = None
        if attention_mask is not None or (config.causal and past > 0 and T > 1):
            everything = torch.ones(1, 1, T, past + T, dtype=torch.bool, device=x.device)
            mask = everything.tril(past) if config.causal else everything
            if attention_mask is not None:
                # padding still sees itself: a softmax over nothing would be NaN, and NaN spreads to the other rows
                itself = everything.tril(past).triu(past)
                mask = mask & attention_mask.bool()[:, None, None, :] | itself
        memory_mask = None
        if encoder_hidden_states is not None:
            if not config.cross_attention:
                raise ValueError("encoder_hidden_states needs a model with cross_attention=True")
            check_shape("encoder_hidden_states", encoder_hidden_states, (B, "M", config.n_embd))
        if encoder_attention_mask is not None:
            if encoder_hidden_states is None:
                raise ValueError("encoder_attention_mask needs the encoder_hidden_states that it masks")
            check_shape("encoder_attention_mask", encoder_attention_mask, (B, encoder_hidden_states.size(1)))
            memory_mask = encoder_attention_mask.bool()[:, None, None, :]
        head_masks: Any = [None] * config.n_layer
        if head_mask is not None:
            check_shape("head_mask (layers, heads)", head_mask, (config.n_head,), (config.n_layer, config.n_head))
            head_masks = head_mask.expand(config.n_layer, config.n_head)

        # ---- blocks
        layer_caches = cache.extend(B, T) if cache is not None else [None] * config.n_layer
        hidden_states: list[Tensor] = []
        attentions: list[Tensor] = []
        for block, layer_head_mask, layer_cache in zip(self.transformer.h, head_masks, layer_caches, strict=True):
            if output_hidden_states:
                hidden_states.append(x)
            x, weights = block(
                x, mask, layer_head_mask, layer_cache, encoder_hidden_states, memory_mask, output_attentions
            )
            if weights is not None:
                attentions.append(weights)
        x = self.transformer.ln_f(x)

        # ---- loss and logits; the head is the transposed token embedding
        loss = logits = None
        if targets is not None:
            loss = linear_cross_entropy(x.flatten(0, 1), self.transformer.wte.weight, targets.flatten())
        if return_logits or (return_logits is None and loss is None):
            logits = F.linear(x[:, -logits_to_keep:], self.transformer.wte.weight)  # -0 is 0: all of them
        all_states = (*hidden_states, x) if output_hidden_states else None
        return GPTOutput(loss, logits, x, all_states, tuple(attentions) if output_attentions else None, cache)

    def check_ids(self, what: str, ids: Tensor, limit: int, limit_name: str) -> None:
        """ValueError unless all ids are in 0..limit-1; looks only where a host read is cheap (see `forward`)."""
        if torch.compiler.is_compiling() or ids.is_meta or (self.training and ids.device.type != "cpu"):
            return
        low, high = (int(value) for value in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= limit:
            raise ValueError(f"{what} hold {low if low < 0 else high}, outside 0..{limit - 1} ({limit_name} {limit})")

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `max_length` tokens of `batch_size` sequences, on the model's device, in its dtype."""
        if max_length > self.config.block_size:
            raise ValueError(f"a cache of {max_length} tokens is longer than block_size {self.config.block_size}")
        if not self.config.causal:
            raise ValueError("a cache needs causal=True: bidirectional keys and values change with every new token")
        weight = self.transformer.wte.weight
        return KVCache(self.config, batch_size, max_length, device=weight.device, dtype=weight.dtype)

    def resize_token_embeddings(self, n: int) -> None:
        """Grow or shrink the vocabulary to `n` tokens: old rows stay as they are, new ones start at N(0, 0.02)."""
        config = replace(self.config, vocab_size=n)
        old = self.transformer.wte.weight
        new = nn.init.normal_(torch.empty_like(old[:1]).repeat(n, 1), std=0.02)
        kept = min(n, len(old))
        new[:kept] = old[:kept]
        self.transformer.wte = nn.Embedding.from_pretrained(new, freeze=not old.requires_grad)
        self.config = config

    def freeze(self, layers: int = 0, embeddings: bool = True) -> None:
        """Keep the first `layers` blocks and, by default, the embeddings (and so the tied head) out of training."""
        if not 0 <= layers <= self.config.n_layer:
            raise ValueError(f"cannot freeze {layers} layers of {self.config.n_layer}")
        self.transformer.h[:layers].requires_grad_(False)
        if embeddings:
            self.transformer.wte.requires_grad_(False)
            self.transformer.wpe.requires_grad_(False)

    def num_parameters(self) -> int:
        """The number of parameters, the tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> GPT:
        """Load a GPT-2 from a directory in transformers' layout, or from the hub, in eval mode.

        Args:
            name_or_dir: a directory; `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`; or another model on the hub.
            dtype: dtype of the parameters. None keeps the dtype of the file.
            device: device of the parameters. They are moved one at a time, so the host never holds the model twice.

        Raises:
            FileNotFoundError: the name is neither a directory nor a model that could be downloaded.
            ValueError: the architecture is not GPT-2's, or tensors are missing, unknown or have the wrong shape (all
                are listed).
        """
        directory = locate(name_or_dir)
        with torch.device("meta"):  # shapes only: the values come from the file
            model = cls(GPTConfig(**read_config(directory)))
        load_weights(model, directory, dtype=dtype, device=device)
        return model.eval()

    def save_pretrained(
        self, directory: str | Path, *, eos_token_id: int | None = None, max_shard_size: int | str = "50GB"
    ) -> None:
        """Write config.json, generation_config.json and model.safetensors, as transformers does.

        Weights above `max_shard_size` are divided into several files. `eos_token_id` is the tokenizer's end-of-text.
        None means 50256 if the vocabulary is GPT-2's.
        """
        save_weights(
            self.state_dict(), asdict(self.config), directory, eos_token_id=eos_token_id, max_shard_size=max_shard_size
        )


# ---------------------------------------------------------------------------------------------------------------------
# Attention's backward pass on a CPU, for which PyTorch's own in bfloat16 takes half as long again

QUERIES, WEIGHTS = 128, 2**20  # attention weights alive at a time: of so many queries, and about so many in all


class CausalAttention(torch.autograd.Function):
    """Causal F.scaled_dot_product_attention of q, k, v (B, H, T, D), with a backward pass of our own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return causal_attention_gradients(dy, *ctx.saved_tensors)


@torch.library.custom_op("gpt2::causal_attention_gradients", mutates_args=())
def causal_attention_gradients(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in q, k and v, given that in y; all (B, H, T, D).

    As FlashAttention does (Dao et al. 2022, algorithm 4), the weights are computed again, a block of queries at a time:
    scores and softmax in float32, the other four products in the dtype of q.
    """
    _, H, T, _ = q.shape
    sequences = max(1, WEIGHTS // (H * QUERIES * T))
    dq, dk, dv = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    for parts in zip(*(t.split(sequences) for t in (dy, q, k, v, dq, dk, dv)), strict=True):
        given, gradients = parts[:4], parts[4:]
        # products of rows that lie together are faster by more than the copy takes
        _fill_in_attention_gradients(
            *(t.flatten(0, 1).contiguous() for t in given), *(t.flatten(0, 1) for t in gradients)
        )
    return dq, dk, dv


def _fill_in_attention_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """All are (heads, T, D); the last three are written to."""
    T, scale = q.size(1), 1 / math.sqrt(q.size(2))
    queries, keys = q.float() * scale, k.float().mT
    dk_sum, dv_sum = torch.zeros_like(queries), torch.zeros_like(queries)
    future = torch.full((QUERIES, QUERIES), float("-inf")).triu(1)
    for first in range(0, T, QUERIES):
        last = min(first + QUERIES, T)
        block, seen = slice(first, last), slice(last)
        scores = queries[:, block] @ keys[:, :, seen]
        scores[:, :, first:] += future[: last - first, : last - first]
        weights = torch.softmax(scores, dim=-1, out=scores).to(q.dtype)
        dweights = dy[:, block] @ v[:, seen].mT
        dscores = torch._softmax_backward_data(dweights, weights, -1, q.dtype)
        dq[:, block] = (dscores @ k[:, seen]).mul_(scale)
        dk_sum[:, seen] += dscores.mT @ q[:, block]
        dv_sum[:, seen] += weights.mT @ dy[:, block]
    dk.copy_(dk_sum.mul_(scale))
    dv.copy_(dv_sum)


@causal_attention_gradients.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The loss

MATMUL_ROWS = 512  # rows of logits alive at a time, in the dtype of the product: enough to keep any matmul busy


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the logits x weightᵀ against the targets that are not IGNORE_INDEX.

    x (N, C), weight (V, C), targets (N,). The result is that of F.cross_entropy(F.linear(x, weight), targets), but the
    logits, by far the largest tensor of a GPT-2 in training, live a chunk at a time and become their own gradient.
    Where no target counts it is 0, not NaN, so that mean times count is the sum for every batch.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with_grad = torch.is_grad_enabled()
    total, _, _ = linear_cross_entropy_sum(
        x, weight, targets, dtype, with_grad and x.requires_grad, with_grad and weight.requires_grad
    )
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def centred_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head (V, C) in `dtype`; in less than float32, with the mean of its rows taken from each.

    That takes one number from all the logits of a position, which softmax does not see. GPT-2's logits have such a
    number in common, near -80, where neighbours in bfloat16 are half a nat apart.
    """
    if dtype.itemsize >= 4:
        return weight.to(dtype)
    head, mean = torch.empty_like(weight, dtype=dtype), weight.mean(dim=0, dtype=torch.float32)
    for part, rows in zip(head.split(2048), weight.split(2048), strict=True):  # no second head in float32
        part.copy_(rows - mean)
    return head


def loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, x_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss () in fp32 and its gradients in x (N, C) and weight (V, C), empty where not asked for."""
    total = x.new_zeros((), dtype=torch.float32)
    dx = torch.empty_like(x) if x_grad else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if weight_grad else weight.new_empty(0)
    head = centred_head(weight, dtype)
    # fp32 is needed of a few rows at a time: as many as a CPU's cache nearly holds, or a GPU takes in one launch
    softmax_rows, columns = (64, 8192) if x.device.type == "cpu" else (MATMUL_ROWS, len(weight))
    rows = min(MATMUL_ROWS, math.ceil(len(x) / 2))  # the logits of a small batch do not exist at once either
    buffer = head.new_empty(rows, len(weight))
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
            log_sum = highest - p.amax(dim=-1, keepdim=True).log()  # log Σ exp(score): the highest has p = exp / Σ exp
            total += ((log_sum - right_score) * count).sum()
            if x_grad or weight_grad:  # d loss / d logits = softmax - one-hot, written over the logits
                part.copy_(p.scatter_add_(1, right, torch.full_like(right_score, -1.0)))
        # what does not count is left out here, where rows are short
        if x_grad:
            dx[chunk] = (logits @ head) * counts
        if weight_grad:  # in blocks, so that no second tensor is as large as the weight
            x_rows = x_rows * counts
            for block, gradient in zip(dweight.split(columns), logits.split(columns, dim=1), strict=True):
                block += gradient.T @ x_rows
    return total, dx, dweight.to(weight.dtype)


# An operator of our own: torch.compile takes it as a whole instead of unrolling its loop, and the gradient is computed
# where the logits are at hand, instead of keeping or recomputing them for the backward pass.
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


def _keep_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, ctx.x_grad, ctx.weight_grad = inputs
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, total_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = ctx.saved_tensors
    # in place, as dweight is large: a second backward pass through the same graph is an error
    dx, dweight = dx.mul_(total_grad), dweight.mul_(total_grad)
    return (dx if ctx.x_grad else None, dweight if ctx.weight_grad else None, None, None, None, None)


linear_cross_entropy_sum.register_autograd(_scale_gradients, setup_context=_keep_gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values of the tokens already seen


class LayerCache(NamedTuple):
    """One layer's part of a KVCache, made by `KVCache.extend` for one forward pass."""

    keys: Tensor  # (B, H, max_length, D)
    values: Tensor
    past: int
    length: int  # past + the tokens of this pass

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, H, T, D) after the past ones; returns all of them, (B, H, S, D)."""
        self.keys[:, :, self.past : self.length] = k.detach()
        self.values[:, :, self.past : self.length] = v.detach()
        return self.keys[:, :, : self.length].to(k.dtype), self.values[:, :, : self.length].to(v.dtype)


class KVCache:
    """Keys and values of all layers, allocated once, filled from the left: `GPT.new_cache` makes one, forward appends.

    For inference: no gradient flows through it.

    Attributes:
        keys, values: L of (B, H, max_length, D); the first `length` tokens are valid.
        length: tokens held of each row, padding included.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, config.n_head, max_length, config.n_embd // config.n_head)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.batch_size, self.max_length = batch_size, max_length
        self.length = 0

    def extend(self, batch_size: int, n_tokens: int) -> list[LayerCache]:
        """Make room for `n_tokens` more in each of `batch_size` rows; returns where each layer has to write them."""
        past, length = self.length, self.length + n_tokens
        if batch_size != self.batch_size:
            raise ValueError(f"the cache has {self.batch_size} rows, the input {batch_size}")
        if length > self.max_length:
            raise ValueError(f"the cache is too small: {past} tokens + {n_tokens} new > max_length {self.max_length}")
        self.length = length
        return [LayerCache(k, v, past, length) for k, v in zip(self.keys, self.values, strict=True)]

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was: beam search's survivors. rows (B,)."""
        for tensor in (*self.keys, *self.values):
            tensor[:, :, : self.length] = tensor[:, :, : self.length].index_select(0, rows)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self.length = length
