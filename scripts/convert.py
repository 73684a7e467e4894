"""Convert a model of nanoGPT (ckpt.pt) or llm.c (.bin) to a directory that every command of this repository can load:

    python -m scripts.convert out/ckpt.pt --out models/nanogpt
    python -m scripts.convert log124M/model_00019560.bin --out models/llm-c
    python sample.py --model models/llm-c --prompt "Hello"

Only the weights are converted, not the state of the optimizer. Without --tokenizer, the directory gets GPT-2's
tokenizer if it fits the vocabulary, and otherwise no tokenizer. Padding of the vocabulary is removed if the llm.c file
or the tokenizer gives the real size.
"""

from __future__ import annotations

if not __package__:  # the file was started by its path, so the imports below would not find the modules
    raise SystemExit("Run this in the root of the repository: python -m scripts.convert")

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from command import CommandParser, ending
from data.tokenizer import Tokenizer, load_tokenizer
from model import ACTIVATIONS, GPT, GPTConfig
from other_formats import LLM_C_MAGIC, conversion_hint, is_llm_c
from pretrained import PADDING_LIMIT, fit_vocabulary
from weights import STALE_BUFFER, check_pickled, unpickle_weights_only

GPT2_VOCAB_SIZE = GPTConfig.vocab_size
HEADER_BYTES = 1024
# Version in the header of an llm.c model -> the NumPy dtype with which the tensors are read, and their PyTorch dtype.
# NumPy has no bfloat16, so bfloat16 tensors are read as int16.
LLM_C_DTYPES = {3: ("<f4", torch.float32), 5: ("<i2", torch.bfloat16)}
# The parameters of a block. A file of llm.c has the first of these parameters for all blocks, then the second parameter
# for all blocks, and so on.
LLM_C_BLOCK = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def read_llm_c(path: Path) -> GPT:
    """Return the model in a file of llm.c (`write_model` in llm.c's train_gpt2.py documents the format).

    Raises ValueError if the file is incomplete or has an unsupported version.
    """
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
    if len(header) < HEADER_BYTES // 4 or header[0] != LLM_C_MAGIC or header[1] not in LLM_C_DTYPES:
        raise ValueError(
            f"{path} is not a model that llm.c writes: its header begins with {header[:2].tolist()}, expected "
            f"{LLM_C_MAGIC} and version 3 (float32) or 5 (bfloat16)"
        )
    stored, dtype = LLM_C_DTYPES[int(header[1])]
    block_size, vocab_size, n_layer, n_head, n_embd, padded = header[2:8].tolist()
    try:
        config = GPTConfig(padded, block_size, n_layer, n_head, n_embd)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # Compare the size before the model is built: building a model of an impossible shape could take hours.
    n_parameters = (padded + block_size + n_layer * (12 * n_embd + 13) + 2) * n_embd
    size = HEADER_BYTES + n_parameters * dtype.itemsize
    if path.stat().st_size != size or not 0 < vocab_size <= padded:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected {size:,}: copy it again")
    shapes = parameter_shapes(config)
    names = [f"transformer.h.{layer}.{name}" for name in LLM_C_BLOCK for layer in range(n_layer)]
    names = ["transformer.wte.weight", "transformer.wpe.weight", *names]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    state: dict[str, Tensor] = {}
    offset = HEADER_BYTES
    for name in names:
        values = np.fromfile(path, stored, shapes[name].numel(), offset=offset)
        offset += values.nbytes
        state[name] = torch.from_numpy(values).view(dtype).view(shapes[name])
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab_size].clone()
    return build(dataclasses.replace(config, vocab_size=vocab_size), state, path)


def read_nanogpt(path: Path, activation: str) -> GPT:
    """Return the model in nanoGPT's ckpt.pt, without executing code that the file contains.

    Raises ValueError if the file is not a checkpoint of nanoGPT or its tensors do not match its configuration.
    """
    checkpoint = unpickle_weights_only(path)
    fields: Any = checkpoint.get("model_args") if isinstance(checkpoint, dict) else None
    if not isinstance(fields, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(
            f"{path} is not a checkpoint of nanoGPT: expected a dictionary with model and model_args. Load the file "
            f"with the program that wrote it, and save such a dictionary"
        )
    check_pickled(path, checkpoint["model"])
    try:
        shape = {name: fields[name] for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
        config = GPTConfig(**shape, dropout=fields.get("dropout", 0.0), activation=activation)
    except KeyError as error:
        raise ValueError(f"{path}: model_args lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: model_args: {error}") from None
    # torch.compile adds the prefix "_orig_mod." to the names of the parameters.
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    state = {name: tensor for name, tensor in state.items() if not STALE_BUFFER.search(name)}
    n_layer = sum(name.endswith(".ln_1.weight") for name in state)
    if n_layer != config.n_layer:  # building a model of a wrong depth could take hours
        raise ValueError(f"{path}: model_args has n_layer {config.n_layer}, but there are tensors of {n_layer} blocks")
    # The head and the token embedding are one tensor in GPT-2, but nanoGPT stores it under both names.
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state.get("transformer.wte.weight", head)):
        raise ValueError(f"{path}: lm_head.weight is not transformer.wte.weight, but GPT-2 ties them")
    if not fields.get("bias", True):  # a model without biases equals one whose biases are 0
        biases = {name: shape for name, shape in parameter_shapes(config).items() if name.endswith(".bias")}
        state = {name: torch.zeros(shape) for name, shape in biases.items()} | state
    return build(config, state, path)


def parameter_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Return the shape of each parameter of a model, by name."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(config).named_parameters()}


def build(config: GPTConfig, state: dict[str, Tensor], path: Path) -> GPT:
    """Return a model with the tensors of `state`.

    Raises ValueError if the tensors do not match the configuration. The message names the file `path`.
    """
    with torch.device("meta"):
        model = GPT(config).eval()
    try:
        model.load_state_dict(state, assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"the tensors in {path} do not match its configuration: {error}") from None
    return model


def choose_tokenizer(model: GPT, name_or_dir: str | None) -> Tokenizer | None:
    """Return the tokenizer of --tokenizer. Without this option, return GPT-2's if it fits, else None.

    GPT-2's tokenizer fits a vocabulary of GPT-2's size, with or without padding. If a tokenizer is returned, padding is
    removed from the model's vocabulary in place. Raises ValueError if the tokenizer of --tokenizer does not fit.
    """
    if name_or_dir is None and not 0 <= model.config.vocab_size - GPT2_VOCAB_SIZE < PADDING_LIMIT:
        return None
    tokenizer = load_tokenizer(name_or_dir or "gpt2")
    fit_vocabulary(model, tokenizer, name_or_dir or "gpt2")
    return tokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m scripts.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="ckpt.pt of nanoGPT, or model_NNNNNNNN.bin of llm.c")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--tokenizer", metavar="gpt2|DIR", help="tokenizer of the model (default: GPT-2's if it fits)")
    parser.add_argument(
        "--activation",
        choices=list(ACTIVATIONS),
        default="gelu",
        help="activation of a nanoGPT model, which its file does not name: gelu since May 2023, gelu_new before",
    )
    args = parser.parse_args(arguments)
    with ending(parser):
        if not args.file.is_file():
            raise FileNotFoundError(f"no such file: {args.file}{conversion_hint(args.file)}")
        if args.out.exists() and any(args.out.iterdir()):
            raise ValueError(f"{args.out} is not empty: choose another directory")
        model = read_llm_c(args.file) if is_llm_c(args.file) else read_nanogpt(args.file, args.activation)
        tokenizer = choose_tokenizer(model, args.tokenizer)
        model.save_pretrained(args.out, eos_token_id=None if tokenizer is None else tokenizer.eot)
        if tokenizer is None:
            print(
                f"the model has {model.config.vocab_size} tokens, and GPT-2's tokenizer {GPT2_VOCAB_SIZE}: {args.out} "
                f"has no tokenizer, which sample.py and eval.run need; --tokenizer DIR adds one",
                file=sys.stderr,
            )
        else:
            tokenizer.save(args.out, model_max_length=model.config.block_size)
        print(f"{args.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
