"""GPT-2 from top to bottom: configuration, attention, MLP, block, model, forward pass, loss and key-value cache.

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and follows
OpenAI's code (https://github.com/openai/gpt-2/blob/master/src/model.py). Parameters have the names that Hugging Face
transformers gives them, so that every tool for GPT-2 can load a model that is saved here. The package kernels/ contains
the masks, and faster forms of attention and of the loss. checks.py validates the arguments of the model.

Letters in shapes:
    B  sequences in the batch              V  vocab_size
    T  tokens of a sequence in this pass   L  n_layer
    C  channels, n_embd                    S  keys: those of the cached tokens and of the T new tokens
    H  attention heads, n_head             M  tokens of an encoder's output (cross-attention only)
    D  channels of each head, C / H
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from checks import check_config, check_encoder_output, check_masks, check_tokens
from kernels.choose_attention import fast_attention
from kernels.gelu import ACTIVATIONS
from kernels.long_attention import find_pattern
from kernels.loss import IGNORE_INDEX, linear_cross_entropy
from kernels.masks import Mask, dense_mask, find_positions, make_mask
from weights import load_weights, locate, open_model, save_weights

# The four released sizes: layers, heads, channels. Depth and width grow, but a head has 64 channels in every size.
# A model has V C + 1024 C + L (12 C² + 13 C) + 2 C parameters: token embeddings, position embeddings, blocks, ln_f.
PRESETS = {
    "gpt2": (12, 12, 768),  # 124,439,808 parameters
    "gpt2-medium": (24, 16, 1024),  # 354,823,168
    "gpt2-large": (36, 20, 1280),  # 774,030,080
    "gpt2-xl": (48, 25, 1600),  # 1,557,611,200
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. An impossible value raises a ValueError that names the field."""

    # The tokenizer is a byte-pair encoding: 256 bytes + 50,000 merges of two tokens into one + 1 for <|endoftext|>.
    vocab_size: int = 50257
    # The longest sequence, in tokens. Positions 0 to 1023 have a learned vector each, and position 1024 has none.
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    # Dropout is applied to the embeddings, to the attention weights and at the end of each residual branch. Pretraining
    # hardly repeats its data and needs no dropout. Fine-tuning on a small dataset needs some dropout, for example 0.1.
    dropout: float = 0.0
    cross_attention: bool = False  # a second attention in each block, over an encoder's output
    causal: bool = True  # False: each token attends to the whole sequence, as in an encoder
    # full: each token attends to itself and all earlier tokens, as in GPT-2, in time proportional to T².
    # window: each token attends to the last window_size tokens, itself included.
    # lsh: each token attends to itself and to the last few earlier tokens whose keys have the same hash as its query.
    attention: str = "full"
    window_size: int = 256
    lsh_buckets: int = 64
    lsh_rounds: int = 2
    # GPT-2 has the default values of the three fields below. Checkpoints of other trainers may need other values.
    n_inner: int | None = None  # channels of the MLP's hidden layer; None means 4 n_embd
    activation: str = "gelu_new"  # one of ACTIVATIONS
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_config(asdict(self), ACTIVATIONS)

    @classmethod
    def preset(cls, name: str) -> GPTConfig:
        """Return the configuration of the released GPT-2 `name`. Raises ValueError if `name` is not in PRESETS."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
        n_layer, n_head, n_embd = PRESETS[name]
        return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd)


class GPTOutput(NamedTuple):
    """The result of a forward pass. Fields that were not requested are None."""

    loss: Tensor | None = None  # (), mean over the targets that are not IGNORE_INDEX, in nats
    logits: Tensor | None = None  # (B, T, V), or (B, k, V) with logits_to_keep=k
    last_hidden_state: Tensor | None = None  # (B, T, C), after ln_f
    hidden_states: tuple[Tensor, ...] | None = None  # L + 1 tensors (B, T, C): embeddings, blocks 1 to L - 1, ln_f
    attentions: tuple[Tensor, ...] | None = None  # L tensors (B, H, T, S)
    cache: KVCache | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Attention(nn.Module):
    """Multi-head attention: softmax(q kᵀ / √D) v in each of H heads (Vaswani et al. 2017, equation 1).

    With `cross`, keys and values come from an encoder's output, as with transformers' `add_cross_attention`.
    """

    def __init__(self, config: GPTConfig, layer: int, cross: bool = False) -> None:
        super().__init__()
        self.n_head, self.dropout, self.causal = config.n_head, config.dropout, config.causal and not cross
        # With attention="window" or "lsh": which of the earlier keys a query attends to. None: all of them.
        self.pattern = None if cross else find_pattern(asdict(config), layer)
        if cross:
            self.q_attn = nn.Linear(config.n_embd, config.n_embd)
        # One matrix product computes q, k and v of all heads: a single large product is faster than 3 H small ones.
        self.c_attn = nn.Linear(config.n_embd, (2 if cross else 3) * config.n_embd)
        # The heads do not interact before this layer, which mixes their results.
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        mask: Mask | None,  # the keys that each query may attend to; None: all, or if causal, those up to the query
        head_mask: Tensor | None = None,  # (H,)
        layer_cache: LayerCache | None = None,
        memory: Tensor | None = None,  # (B, M, C)
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result (B, T, C) and, if requested, the attention weights (B, H, T, S)."""
        if memory is None:
            q, k, v = self.c_attn(x).chunk(3, dim=-1)  # three tensors (B, T, C)
        else:
            q, (k, v) = self.q_attn(x), self.c_attn(memory).chunk(2, dim=-1)
        # Move the heads next to the batch: the products below then run for each head of each sequence separately.
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, T or M, D)
        if layer_cache is not None:
            k, v = layer_cache.append(k, v)  # (B, H, S, D)
        # Without the causal mask a token could read its own target from the next position: the training loss would go
        # to zero and the model could not generate. A single query (cached decoding) belongs to the last token: it may
        # attend to every key and needs no mask. `bool`: in torch.export and torch.jit.trace, q.size(2) is a symbol.
        is_causal = bool(self.causal and mask is None and q.size(2) > 1)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if head_mask is None and not output_weights:
            # Fused kernels compute the plain form below without writing the (T, S) weights to memory (FlashAttention,
            # Dao et al. 2022), so memory grows with T and not with T².
            y = fast_attention(q, k, v, mask, dropout, is_causal, self.pattern, training=self.training)
        else:
            # The plain form. A score is a sum of D products, so its variance grows with D. Dividing by √D keeps the
            # variance near 1. If scores are large, softmax saturates: one key gets all the weight, and the gradient
            # vanishes.
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
            if (allowed := dense_mask(q, k, mask, is_causal, self.pattern)) is not None:
                scores = scores.masked_fill(~allowed, float("-inf"))  # exp(-inf) is a weight of exactly 0
            # Dropout here removes some keys of a query at random, so that no token relies on a single other token.
            weights = F.dropout(scores.softmax(dim=-1), dropout)  # (B, H, T, S)
            if head_mask is not None:
                weights = weights * head_mask.view(-1, 1, 1)
            y = weights.to(v.dtype) @ v  # (B, H, T, D)
        # Put the heads side by side again, (B, T, C), and mix them.
        return self.c_proj(y.transpose(1, 2).flatten(2)), weights if output_weights else None


class MLP(nn.Module):
    """Two linear layers with an activation (GPT-2: GELU) between them, applied to each position separately."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        # Attention moves information between positions; the MLP processes it at each position. Its hidden layer has 4 C
        # channels, as in Vaswani et al. 2017. The MLP holds two thirds of a block's parameters: 8 C² of 12 C².
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)  # (B, T, n_inner)
        if not self.training:
            return self._project(h)
        # GELU's output is as large as h. To save memory, compute it again in the backward pass instead of storing it.
        return checkpoint(self._project, h, use_reentrant=False, preserve_rng_state=False)

    def _project(self, h: Tensor) -> Tensor:
        return self.c_proj(self.activation(h))


class Block(nn.Module):
    """Attention, then MLP. Each one adds its result to the residual stream x (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        # GPT-2's eps is 1e-5: the released weights were trained with it.
        eps = config.layer_norm_epsilon
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=eps)
        self.attn = Attention(config, layer)
        if config.cross_attention:
            self.crossattention = Attention(config, layer, cross=True)
            self.ln_cross_attn = nn.LayerNorm(config.n_embd, eps=eps)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        mask: Mask | None = None,
        head_mask: Tensor | None = None,
        layer_cache: LayerCache | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,  # (B, 1, 1, M)
        output_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new residual stream (B, T, C) and, if requested, the self-attention weights (B, H, T, S)."""
        # Pre-LayerNorm: the input of each sublayer is normalized, the stream itself is not (GPT-2 paper, section 2.3).
        # So gradients reach every layer through additions alone. The original Transformer normalizes x + f(x) instead.
        # There, gradients pass through 2 L LayerNorms, and training diverges without a long warmup (Xiong et al. 2020).
        y, weights = self.attn(self.ln_1(x), mask, head_mask, layer_cache, output_weights=output_weights)
        x = x + self.dropout(y)
        if memory is not None:
            x = x + self.dropout(self.crossattention(self.ln_cross_attn(x), memory_mask, memory=memory)[0])
        return x + self.dropout(self.mlp(self.ln_2(x))), weights


class Transformer(nn.Module):
    """The modules that `GPT.forward` connects. As in transformers, parameter names begin with `transformer.`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        # The same matrix embeds tokens and, transposed, is the output head (Press and Wolf 2017). Both uses need
        # similar vectors for similar tokens. A second matrix would add 38.6 million parameters to the 124 million.
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        # Attention by itself does not know the order of its keys. These learned vectors tell it each token's position.
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # With pre-LayerNorm no block normalizes the stream itself, so the output head needs a LayerNorm before it.
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class GPT(nn.Module):
    """GPT-2 with its output head: `GPT(GPTConfig())` is the 124M model with random weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize all parameters as GPT-2 does."""
        # The weights are so small (standard deviation 0.02) that the first predictions are nearly uniform. So the loss
        # starts near ln(50257) = 10.8 nats. A much higher first loss means that the initialization is wrong.
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:  # LayerNorm
                nn.init.ones_(parameter)
            elif name.endswith("c_proj.weight"):
                # These layers write to the residual stream. The variances of the 2 L results add up, so without the
                # factor 1/√(2 L) the stream would grow with the depth (GPT-2 paper, section 2.3).
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                # 0.02 is the constant of OpenAI's code, close to 1/√C of the released sizes (0.036 to 0.025).
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        input_ids: Tensor | None = None, *, inputs_embeds: Tensor | None = None,
        targets: Tensor | None = None, labels: Tensor | None = None,
        attention_mask: Tensor | None = None, position_ids: Tensor | None = None, document_ids: Tensor | None = None,
        head_mask: Tensor | None = None, cache: KVCache | None = None,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        output_hidden_states: bool = False, output_attentions: bool = False,
        return_logits: bool | None = None, logits_to_keep: int = 0,
    ) -> GPTOutput:  # fmt: skip
        """Run the model on T tokens of each of B sequences, which follow `past` cached tokens.

        Args:
            input_ids: (B, T) token ids. Give either `input_ids` or `inputs_embeds`, but not both.
            inputs_embeds: (B, T, C), used in place of the token embeddings.
            targets: (B, T), the id of the token after each input, or IGNORE_INDEX for no loss there. Not with labels.
            labels: (B, T) ids (usually the inputs themselves), which this function shifts by one, as in transformers.
            attention_mask: (B, past + T), 1 for a token to keep and 0 for padding.
            position_ids: (B, T) or (T,). By default, positions begin at `past`. With an attention mask, the default
                positions count the kept tokens of each row, so padding on the left does not change them.
            document_ids: (B, T), equal for neighboring tokens of the same document. Tokens then attend to their own
                document only, and default positions begin at 0 in each document. Not with a cache or an attention mask.
            head_mask: (H,) or (L, H), multiplies the attention weights of each head.
            cache: keys and values of the past tokens, from `new_cache`; those of the new tokens are appended.
            encoder_hidden_states: (B, M, C), for a model with cross_attention.
            encoder_attention_mask: (B, M), 1 for a token to keep and 0 for padding.
            return_logits: whether to compute logits. None computes them only if there are no targets or labels.
            logits_to_keep: k > 0 computes the logits of the last k positions only, 0 those of all positions.

        Raises:
            ValueError: wrong combination, shape, length or id. The range of ids is not checked inside torch.compile or
                on a GPU: check ids before you copy them to the GPU.
        """
        config = self.config
        past = 0 if cache is None else cache.length
        B, T = check_tokens(config, past, input_ids, inputs_embeds, targets, labels, IGNORE_INDEX)
        check_masks(config, cache, B, T, attention_mask, position_ids, document_ids, head_mask)
        check_encoder_output(config, B, encoder_hidden_states, encoder_attention_mask)

        # Embed tokens and positions: their sum is the residual stream x, to which each block adds its results.
        embeddings = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if position_ids is None:
            position_ids = find_positions(attention_mask, document_ids, past, T, embeddings.device)  # (B, T) or (T,)
        x = self.transformer.drop(embeddings + self.transformer.wpe(position_ids))  # (B, T, C)

        # Decide which keys each query attends to, and which heads take part.
        mask = make_mask(attention_mask, document_ids, past, T, x.device, causal=config.causal)
        memory_mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None, :]
        none_per_layer: list[None] = [None] * config.n_layer
        head_masks = none_per_layer if head_mask is None else head_mask.expand(config.n_layer, config.n_head)

        # Run the blocks. The cache grows only now, so a call that raised an error above leaves it unchanged.
        layer_caches = none_per_layer if cache is None else cache.extend(B, T)
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
        x = self.transformer.ln_f(x)  # (B, T, C)

        # Apply the output head, the transposed token embedding. The loss is computed without storing all logits.
        loss = logits = None
        if labels is not None:  # token t predicts token t + 1, and no token follows the last one
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if targets is not None:
            loss = linear_cross_entropy(x.flatten(0, 1), self.transformer.wte.weight, targets.flatten())
        if return_logits or (return_logits is None and loss is None):
            logits = F.linear(x[:, -logits_to_keep:], self.transformer.wte.weight)  # x[:, -0:] is all of x
        all_states = (*hidden_states, x) if output_hidden_states else None
        return GPTOutput(loss, logits, x, all_states, tuple(attentions) if output_attentions else None, cache)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Return an empty cache for `max_length` tokens of each sequence, on the model's device and in its dtype."""
        if max_length > self.config.block_size:
            raise ValueError(f"a cache of {max_length} tokens is longer than block_size {self.config.block_size}")
        if not self.config.causal:
            raise ValueError("a cache needs causal=True: bidirectional keys and values change with every new token")
        weight = self.transformer.wte.weight
        return KVCache(self.config, batch_size, max_length, device=weight.device, dtype=weight.dtype)

    def resize_token_embeddings(self, n: int) -> None:
        """Change the vocabulary to `n` tokens. Tokens that remain keep their embeddings, new ones get random ones."""
        config = replace(self.config, vocab_size=n)  # checks n before anything changes
        old = self.transformer.wte.weight
        new = nn.init.normal_(torch.empty_like(old[:1]).repeat(n, 1), std=0.02)
        kept = min(n, len(old))
        new[:kept] = old[:kept]
        self.transformer.wte = nn.Embedding.from_pretrained(new, freeze=not old.requires_grad)
        self.config = config

    def freeze(self, layers: int = 0, embeddings: bool = True) -> None:
        """Exclude the first `layers` blocks and, by default, the embeddings from training.

        The token embeddings are also the output head, so `embeddings` also freezes the head. Raises ValueError if the
        model has fewer than `layers` blocks.
        """
        if not 0 <= layers <= self.config.n_layer:
            raise ValueError(f"cannot freeze {layers} layers of {self.config.n_layer}")
        self.transformer.h[:layers].requires_grad_(False)
        if embeddings:
            self.transformer.wte.requires_grad_(False)
            self.transformer.wpe.requires_grad_(False)

    def num_parameters(self) -> int:
        """Return the number of parameters. The token embedding, which is also the output head, is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> GPT:
        """Load a GPT-2, in eval mode, from a run, a directory in transformers' or OpenAI's layout, or the hub.

        Args:
            name_or_dir: a directory; `gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`; or another hub id.
            dtype: dtype of the parameters; None keeps the dtype of the file.
            device: device of the parameters. They are moved one by one, so the host never holds the model twice.

        Raises:
            FileNotFoundError: the name is neither a directory nor a model that could be downloaded, or the
                directory lacks a configuration or weights.
            ValueError: the architecture is not GPT-2's; tensors are missing, unknown or have the wrong shape (all are
                listed); or a file is damaged.
        """
        stored = open_model(locate(name_or_dir))
        with torch.device("meta"):  # shapes only: the values come from the file
            model = cls(GPTConfig(**stored.config_arguments()))
        load_weights(model, stored, dtype=dtype, device=device)
        return model.eval()

    def save_pretrained(
        self, directory: str | Path, *, eos_token_id: int | None = None, max_shard_size: int | str = "50GB"
    ) -> None:
        """Write config.json, generation_config.json and model.safetensors, as transformers does.

        Weights above `max_shard_size` are divided into several files. `eos_token_id` is the id of the tokenizer's
        end-of-text token. None means 50256 if the vocabulary has the size of GPT-2's, otherwise no such token.
        """
        save_weights(
            self.state_dict(), asdict(self.config), directory, eos_token_id=eos_token_id, max_shard_size=max_shard_size
        )


# ---------------------------------------------------------------------------------------------------------------------
# The key-value cache
#
# In a causal model, the keys and values of a token do not depend on the tokens after it. Generation stores them, so
# that a new token needs a pass over this token alone. Without the cache it needs a pass over the whole text so far.


class LayerCache(NamedTuple):
    """One layer's part of a KVCache, made by `KVCache.extend` for one forward pass."""

    keys: Tensor  # (B, H, max_length, D)
    values: Tensor
    past: int  # number of tokens that were stored before this pass
    length: int  # past + the number of tokens of this pass

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, H, T, D) after the past ones, and return all of them, (B, H, S, D)."""
        # The cache is written in place. Autograd cannot differentiate through overwritten tensors, so detach k and v.
        self.keys[:, :, self.past : self.length] = k.detach()
        self.values[:, :, self.past : self.length] = v.detach()
        # Under autocast k and v have less precision than the cache, and a product needs operands of the same dtype.
        return self.keys[:, :, : self.length].to(k.dtype), self.values[:, :, : self.length].to(v.dtype)


class KVCache:
    """The keys and values of all layers. `GPT.new_cache` makes one, and each forward pass appends to it.

    Use a cache only for inference: gradients do not flow through it. A token takes 2 L C numbers: 74 kB for the 124M
    model in float32.

    Attributes:
        keys, values: lists of L tensors (B, H, max_length, D), in which the first `length` tokens are valid.
        length: the number of tokens that are stored for each row, padding included.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, config.n_head, max_length, config.n_embd // config.n_head)
        # Allocated once at full length: concatenation would copy all stored keys and values for each new token.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.batch_size, self.max_length = batch_size, max_length
        self.length = 0

    def extend(self, batch_size: int, n_tokens: int) -> list[LayerCache]:
        """Reserve space for `n_tokens` tokens in each of `batch_size` rows, and return a LayerCache for each layer."""
        past, length = self.length, self.length + n_tokens
        if batch_size != self.batch_size:
            raise ValueError(f"the cache has {self.batch_size} rows, the input {batch_size}")
        if length > self.max_length:
            raise ValueError(f"the cache is too small: {past} tokens + {n_tokens} new > max_length {self.max_length}")
        self.length = length
        return [LayerCache(k, v, past, length) for k, v in zip(self.keys, self.values, strict=True)]

    def reorder(self, rows: Tensor) -> None:
        """Replace each row i by row rows[i]; rows: (B,). Beam search calls this to keep the beams that it continues."""
        for tensor in (*self.keys, *self.values):
            tensor[:, :, : self.length] = tensor[:, :, : self.length].index_select(0, rows)

    def crop(self, length: int) -> None:
        """Keep only the first `length` tokens. Raises ValueError if the cache holds fewer tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self.length = length
