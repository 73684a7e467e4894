"""Causal models of transformers behind the little of GPT's interface that evaluations use, so that they are measured
in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import GPTOutput


@dataclass(frozen=True)
class PeerConfig:
    """block_size is what the model states as its longest sequence."""

    vocab_size: int
    block_size: int


class Peer(nn.Module):
    """A causal language model of transformers."""

    vocab_padding_limit = 1 << 16  # how far the vocabulary may exceed the tokenizer's: some leave thousands unused

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
        block_size = next((getattr(config, name) for name in names if getattr(config, name, None)), 2048)
        self.config = PeerConfig(config.vocab_size, block_size)

    def forward(self, input_ids: Tensor, *, logits_to_keep: int = 0) -> GPTOutput:
        """Logits (B, k, V) of the last k positions, or of all."""
        logits = self.model(input_ids, use_cache=False, logits_to_keep=logits_to_keep).logits
        return GPTOutput(logits=logits)


class PeerTokenizer:
    """A tokenizer of transformers. It adds no special token to a text by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        eot = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if eot is None:
            raise ValueError("the tokenizer has neither a bos nor an eos token to begin a text with")
        self.eot: int = eot

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""
        return self.tokenizer.decode(ids)


def load_peer(directory: str | Path, device: torch.device) -> tuple[Peer, PeerTokenizer]:
    """A causal model and its tokenizer from a directory in transformers' layout, in fp32 and eval mode.

    Raises ValueError when transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"transformers cannot load {directory}: {str(error).splitlines()[0]}") from error
    peer = Peer(model).to(device)
    return peer.eval(), PeerTokenizer(tokenizer)
