"""Read and write GPT-2's files in the layout of Hugging Face transformers: config.json and tensors.

Parameters have the same names here as in transformers, but transformers stores some matrices transposed. This module
knows no model class: it handles `GPTConfig`'s fields as a dictionary, and any `nn.Module` with GPT-2's parameter names.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

# transformers stores these matrices as Conv1D weights, (in, out), and nn.Linear stores (out, in). They are selected by
# name, because attn.c_proj is square and its shape does not show whether it is transposed.
CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
# Buffers that hold the causal mask in old checkpoints. They are not parameters.
STALE_BUFFER = re.compile(r"h\.\d+\.(attn|crossattention)\.(bias|masked_bias)$")

# Fields of config.json for which only GPT-2's value is implemented. Another value means another architecture.
FIXED_CONFIG = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "model_type": "gpt2",
    "reorder_and_upcast_attn": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
# Other fields that transformers writes, with its default values. Nothing in this repository depends on them.
INERT_CONFIG = {
    "initializer_range": 0.02,
    "n_inner": None,
    "pad_token_id": None,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "use_cache": True,
}
# transformers' name -> GPTConfig's name. GPTConfig has one dropout rate for transformers' three.
CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "attn_pdrop": "dropout",
    "embd_pdrop": "dropout",
    "resid_pdrop": "dropout",
    "add_cross_attention": "cross_attention",
}


def locate(name_or_dir: str | Path) -> Path:
    """Return the directory that holds a model's files.

    A directory is returned as it is. Any other name is a model on the Hugging Face hub: the result is its snapshot in
    the local cache, which is downloaded if it is missing.

    Raises:
        FileNotFoundError: the name is neither a directory nor a model that could be downloaded.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_dir)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no such model directory: {name}")
    from huggingface_hub import snapshot_download  # imported here: a local directory does not need the hub's client

    try:
        snapshot = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not any(snapshot.glob("*.safetensors")):  # true of older models on the hub
            snapshot = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "pytorch_model.bin"]))
    except OSError as error:  # the base class of all errors of the hub's client
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is not a directory, and as a hub id it could not be fetched ({reason}). "
            f"Check the name and the network, or give a directory that holds config.json and model.safetensors"
        ) from error
    return snapshot


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError, naming the file, if it holds something else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected an object")
    return fields


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return the keyword arguments of `GPTConfig` for the model that a directory's config.json describes.

    Raises:
        FileNotFoundError: the directory has no config.json.
        ValueError: the file describes another architecture than GPT-2's, or lacks a field. The message names the field.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a model directory: it has no config.json")
    fields = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "add_cross_attention": False} | read_json(path)
    if fields.get("activation_function") == "gelu_pytorch_tanh":  # transformers' other name for gelu_new
        fields["activation_function"] = "gelu_new"
    for name, value in FIXED_CONFIG.items():
        if (found := fields.get(name, value)) != value:
            raise ValueError(f"{path}: {name} is {found!r}, but only GPT-2's {value!r} is implemented")
    if missing := [name for name in ("model_type", *CONFIG_FIELDS) if name not in fields]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    dropouts = {fields[name] for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    if len(dropouts) > 1:
        warnings.warn(f"{path} has dropout rates {sorted(dropouts)}: {max(dropouts)} is used for all", stacklevel=2)
    n_inner, n_embd = fields.get("n_inner"), fields["n_embd"]
    if n_inner is not None and isinstance(n_embd, int) and n_inner != 4 * n_embd:  # GPTConfig refuses another type
        raise ValueError(f"{path}: n_inner is {n_inner}, expected 4 x n_embd = {4 * n_embd}")
    ours = {ours: fields[theirs] for theirs, ours in CONFIG_FIELDS.items()}
    return ours | {"dropout": max(dropouts), "causal": fields.get("causal", True)}


def read_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors in a directory's model.safetensors, its shards, or pytorch_model.bin.

    Only one tensor is in memory at a time: copy it before you ask for the next one. The largest tensor of a file comes
    first, when the fewest other tensors have been loaded.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    pickled = directory / "pytorch_model.bin"
    if (directory / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(
                f"{index} has no weight_map, which says which file holds which tensor: download the model again"
            )
        files = sorted(set(places.values()))
    elif pickled.is_file():
        mapped = zipfile.is_zipfile(pickled)  # otherwise PyTorch before 1.6 wrote it: no mmap
        load = partial(torch.load, pickled, map_location="cpu", weights_only=True, mmap=mapped)
        try:
            state = load()
            names = sorted(state, key=lambda name: -state[name].numel())
        except Exception as error:  # unpickling a damaged file can raise any exception
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{pickled} cannot be read as plain tensors ({reason}), and no other pickle is loaded, because it "
                f"could execute code: use safetensors"
            ) from error
        for name in names:
            yield name, state.pop(name)
            if mapped:  # reopened for each tensor, for the reason given below
                state = load()
        return
    else:
        raise FileNotFoundError(
            f"{directory} holds no weights: expected model.safetensors, its shards, or pytorch_model.bin"
        )

    for file in files:
        try:
            with safe_open(directory / file, framework="pt") as tensors:
                names = sorted(tensors.keys(), key=lambda name: -math.prod(tensors.get_slice(name).get_shape()))
            for name in names:
                # The file is reopened for each tensor, which releases the memory that maps the previous tensor.
                with safe_open(directory / file, framework="pt") as tensors:
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{directory / file} cannot be read ({error}): download or copy it again") from error


def load_weights(
    model: nn.Module, directory: str | Path, *, dtype: torch.dtype | None, device: str | torch.device
) -> None:
    """Replace a model's parameters with the tensors in a directory, each converted to `dtype` and moved to `device`.

    The model may be on the meta device. dtype=None keeps the dtype of the file.

    Raises:
        ValueError: tensors are missing, unknown or have the wrong shape (all are listed), or a file is damaged.
    """
    wanted = {name.removeprefix("gpt."): parameter for name, parameter in model.named_parameters()}
    seen: set[str] = set()
    unknown: list[str] = []
    misshapen: list[str] = []
    for source, tensor in read_tensors(directory):
        if STALE_BUFFER.search(source):
            continue
        # The head is tied to the token embedding. Files that GPT2Model saved lack the prefix "transformer.".
        name = "transformer.wte.weight" if source == "lm_head.weight" else source
        name = name if name in wanted else f"transformer.{name}"
        if name not in wanted:
            unknown.append(source)
            continue
        if CONV1D.search(name):
            tensor = tensor.T
        parameter = wanted[name]
        if tensor.shape != parameter.shape:
            misshapen.append(f"{source} {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
        else:
            value = torch.empty_like(parameter, device=device, dtype=dtype or tensor.dtype).copy_(tensor)
            if name in seen and not torch.equal(value, parameter):
                raise ValueError(f"{directory}: lm_head.weight is not transformer.wte.weight, but GPT-2 ties them")
            torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
        seen.add(name)
    missing = [name for name in wanted if name not in seen]
    found = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if problems := "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names):
        raise ValueError(f"the tensors in {directory} do not match its config.json: {problems}")


def save_weights(
    state: dict[str, Tensor],
    config: dict[str, Any],
    directory: str | Path,
    *,
    eos_token_id: int | None = None,
    max_shard_size: int | str = "50GB",
    architecture: str = "GPT2LMHeadModel",
    extra_config: dict[str, Any] | None = None,
) -> None:
    """Write a state dict and its configuration as transformers writes a GPT-2.

    Args:
        state: tensors with the names and shapes of our modules.
        config: the fields of GPTConfig, by name.
        directory: created if it does not exist.
        eos_token_id: the tokenizer's end-of-text. None means 50256 if the vocabulary is GPT-2's.
        max_shard_size: weights above this size are divided into several files.
        architecture: the class of transformers that loads the files.
        extra_config: fields that this class has in config.json in addition.
    """
    from huggingface_hub import save_torch_state_dict  # imported here: loading a model does not need it

    if eos_token_id is None and config["vocab_size"] == 50257:
        eos_token_id = 50256
    special = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    fields: dict[str, Any] = {theirs: config[ours] for theirs, ours in CONFIG_FIELDS.items()}
    fields["architectures"] = [architecture]
    fields["dtype"] = str(state["transformer.wte.weight"].dtype).removeprefix("torch.")
    if not config["causal"]:
        fields["causal"] = False  # a field of this repository: transformers has no bidirectional GPT-2
    fields |= FIXED_CONFIG | INERT_CONFIG | special | (extra_config or {})
    if architecture == "GPT2ForSequenceClassification":
        fields["pad_token_id"] = eos_token_id  # without it, transformers refuses batches of more than one row
    generation = special | {"_from_model_config": True, "use_cache": True}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": fields, "generation_config.json": generation}.items():
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {name: (t.T if CONV1D.search(name) else t).contiguous() for name, t in state.items()}
    save_torch_state_dict(tensors, directory, max_shard_size=max_shard_size)
