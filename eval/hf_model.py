"""Give causal language models of the transformers library the interface that evaluation expects of a GPT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import GPTOutput


@dataclass(frozen=True)
class HFModelConfig:
    """The two fields of GPTConfig that evaluation uses."""

    vocab_size: int
    block_size: int  # maximum sequence length in tokens


class HFModel(nn.Module):
    """A causal language model of transformers.

    Args:
        model: a model of a class for causal language models, such as LlamaForCausalLM.
        n_tokens: number of tokens of the model's tokenizer. The logits of ids from n_tokens on are removed, so that
            these ids get no probability.
    """

    # A model may have several thousand more vocabulary entries than its tokenizer has tokens. `check_pair` in
    # eval/likelihood.py requires that the difference is below this limit.
    vocab_padding_limit = 1 << 16

    def __init__(self, model: Any, n_tokens: int) -> None:
        super().__init__()
        self.model, self.n_tokens = model, n_tokens
        config = model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
        block_size = next((getattr(config, name) for name in names if getattr(config, name, None)), 2048)
        self.config = HFModelConfig(config.vocab_size, block_size)

    def forward(self, input_ids: Tensor, *, logits_to_keep: int = 0) -> GPTOutput:
        """Return the logits (B, k, V) of the last k = `logits_to_keep` positions, or of all positions if k is 0."""
        logits = self.model(input_ids, use_cache=False, logits_to_keep=logits_to_keep).logits
        return GPTOutput(logits=logits[..., : self.n_tokens])


class HFTokenizer:
    """A tokenizer of transformers that adds no special tokens to a text.

    `eot` is the id of the bos token or, if this is missing, of the eos token. Raises ValueError if both are missing.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        eot = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if eot is None:
            raise ValueError("the tokenizer has neither a bos nor an eos token; scoring needs one to start a text with")
        self.eot: int = eot

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`."""
        # With clean-up, transformers would remove the space in " ." and similar places.
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def load_hf_model(directory: str | Path, device: torch.device) -> tuple[HFModel, HFTokenizer]:
    """Load a causal model and its tokenizer from a directory in transformers' layout, in float32 and eval mode.

    Raises ValueError if transformers cannot load the model or the tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # imported here: evaluating a GPT-2 does not use it

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"transformers cannot load {directory}: {str(error).splitlines()[0]}") from error
    return HFModel(model, len(tokenizer)).to(device).eval(), HFTokenizer(tokenizer)
