"""Small models of transformers, and their configurations, for the tests of the files in its layout."""

import json

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPTConfig

SHAPE = {"vocab_size": 90, "n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 16}
OURS = GPTConfig(vocab_size=90, block_size=24, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


def transformers_model(**options):
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": None}
    theirs = GPT2LMHeadModel(GPT2Config(**SHAPE | special | options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # so that biases and gains differ from 0 and 1
    return theirs


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
