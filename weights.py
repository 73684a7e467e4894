"""A GPT-2's files as Hugging Face transformers has them: config.json and safetensors, in and out.

Parameters have the same names here and there; what differs is that transformers holds some matrices transposed.
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
from torch import Tensor

from model import GPTConfig

# transformers holds these as Conv1D, (in, out), where nn.Linear has (out, in). Chosen by name: attn.c_proj is square,
# so shapes do not tell.
CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
# Buffers with the causal mask in it, which old checkpoints carry; not parameters.
STALE_BUFFER = re.compile(r"h\.\d+\.(attn|crossattention)\.(bias|masked_bias)$")

# What a GPT-2's config.json may say and is implemented in just one way: with another value it is another model.
FIXED_CONFIG = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "model_type": "gpt2",
    "reorder_and_upcast_attn": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
# What transformers writes besides, with its defaults; nothing here depends on it.
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
# transformers' names for the fields of GPTConfig; of three dropout rates we have one.
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
    """The directory of a model: itself, or the hub's snapshot of it in the local cache, fetched when missing."""
    path = Path(name_or_dir).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_dir)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"no such model directory: {name}")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not any(snapshot.glob("*.safetensors")):  # the older half of the hub
            snapshot = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "pytorch_model.bin"]))
    except OSError as error:  # all of the hub's own errors are among them
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is not a directory, and as a hub id it could not be fetched ({reason}). "
            f"Check the name and the network, or give a directory that holds config.json and model.safetensors"
        ) from error
    return snapshot


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a ValueError that names the file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected an object")
    return fields


def read_config(directory: str | Path) -> GPTConfig:
    """The GPTConfig that a directory's config.json describes, or a ValueError naming what it has that GPT-2 has not."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no model directory: it has no config.json")
    fields = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "add_cross_attention": False} | read_json(path)
    if fields.get("activation_function") == "gelu_pytorch_tanh":  # another name of the same function
        fields["activation_function"] = "gelu_new"
    for name, value in FIXED_CONFIG.items():
        if (found := fields.get(name, value)) != value:
            raise ValueError(f"{path}: {name} is {found!r}; GPT-2 has {value!r}, and nothing else is implemented")
    if missing := [name for name in ("model_type", *CONFIG_FIELDS) if name not in fields]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    dropouts = {fields[name] for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    if len(dropouts) > 1:
        warnings.warn(f"{path} has dropout rates {sorted(dropouts)}: all become {max(dropouts)}", stacklevel=2)
    ours = {ours: fields[theirs] for theirs, ours in CONFIG_FIELDS.items()}
    config = GPTConfig(**ours | {"dropout": max(dropouts), "causal": fields.get("causal", True)})
    if fields.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner is {fields['n_inner']}, expected 4 x n_embd = {4 * config.n_embd}")
    return config


def read_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors in a directory's model.safetensors, its shards, or pytorch_model.bin, one at a time.

    Each is to be copied before the next is asked for. Of one file the largest comes first, while memory is emptiest.
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
                f"{index} has no weight_map that says which file holds which tensor: fetch the model again"
            )
        files = sorted(set(places.values()))
    elif pickled.is_file():
        mapped = zipfile.is_zipfile(pickled)  # else written by PyTorch before 1.6, and read as a whole
        load = partial(torch.load, pickled, map_location="cpu", weights_only=True, mmap=mapped)
        try:
            state = load()
            names = sorted(state, key=lambda name: -state[name].numel())
        except Exception as error:  # unpickling garbage can raise anything
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{pickled} cannot be read as plain tensors, and is not read otherwise ({reason}): use safetensors"
            ) from error
        for name in names:
            yield name, state.pop(name)
            if mapped:  # anew each time, as below
                state = load()
        return
    else:
        raise FileNotFoundError(
            f"{directory} holds no weights: expected model.safetensors, its shards, or pytorch_model.bin"
        )

    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(directory / file, framework="pt") as tensors:
                names = sorted(tensors.keys(), key=lambda name: -math.prod(tensors.get_slice(name).get_shape()))
            for name in names:
                # opened anew each time, so that the pages of the file behind one tensor are let go before the next
                with safe_open(directory / file, framework="pt") as tensors:
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{directory / file} cannot be read ({error}): fetch or copy it again") from error


def load_weights(
    model: nn.Module, directory: str | Path, *, dtype: torch.dtype | None, device: str | torch.device
) -> None:
    """Fill a model, which may be on the meta device, with a directory's tensors: each converted, moved and assigned."""
    wanted = {name.removeprefix("gpt."): parameter for name, parameter in model.named_parameters()}
    seen: set[str] = set()
    unknown: list[str] = []
    misshapen: list[str] = []
    for source, tensor in read_tensors(directory):
        if STALE_BUFFER.search(source):
            continue
        # the tied head is the embedding under another name; GPT2Model's own files lack the prefix
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
                raise ValueError(f"{directory}: lm_head.weight is not transformer.wte.weight, but GPT-2 ties the two")
            torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
        seen.add(name)
    missing = [name for name in wanted if name not in seen]
    found = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if problems := "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names):
        raise ValueError(f"the tensors in {directory} are not those of its config.json: {problems}")


def save_weights(
    state: dict[str, Tensor],
    config: GPTConfig,
    directory: str | Path,
    *,
    eos_token_id: int | None = None,
    max_shard_size: int | str = "50GB",
    architecture: str = "GPT2LMHeadModel",
    extra_config: dict[str, Any] | None = None,
) -> None:
    """Write a state dict, with our names and shapes, and its configuration as transformers writes a GPT-2.

    `architecture` is the transformers class that it is, `extra_config` what else that class has in its config.json.
    """
    from huggingface_hub import save_torch_state_dict

    if eos_token_id is None and config.vocab_size == 50257:
        eos_token_id = 50256
    special = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    fields: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in CONFIG_FIELDS.items()}
    fields["architectures"] = [architecture]
    fields["dtype"] = str(state["transformer.wte.weight"].dtype).removeprefix("torch.")
    if not config.causal:
        fields["causal"] = False  # ours alone: transformers has no bidirectional GPT-2
    fields |= FIXED_CONFIG | INERT_CONFIG | special | (extra_config or {})
    if architecture == "GPT2ForSequenceClassification":
        fields["pad_token_id"] = eos_token_id  # without one transformers takes a single row at a time
    generation = special | {"_from_model_config": True, "use_cache": True}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": fields, "generation_config.json": generation}.items():
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {name: (t.T if CONV1D.search(name) else t).contiguous() for name, t in state.items()}
    save_torch_state_dict(tensors, directory, max_shard_size=max_shard_size)
