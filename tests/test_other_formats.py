"""Test that the error for a file of another program names the command that converts it."""

import struct

import pytest

from model import GPT
from other_formats import LLM_C_MAGIC, conversion_hint
from weights import locate

FILES = {
    "ckpt.pt": r"is a file of PyTorch, .*: run `python -m scripts.convert .*/ckpt.pt --out NEW`",
    "model_00000010.bin": r"is a file of llm.c: run `python -m scripts.convert .*/model_00000010.bin --out NEW`",
    "gpt2.gguf": r'"transformers<5" gguf.*from_pretrained\(".*", gguf_file="gpt2.gguf"\).save_pretrained\("NEW"\)',
    "flax_model.msgpack": r'"transformers<5" flax.*from_pretrained\(".*", from_flax=True\)',
    "tf_model.h5": r'"transformers<5" tensorflow.*from_pretrained\(".*", from_tf=True\)',
    "model_optim_rng.pt": r"--load_path .* --save_path NEW`",
    "latest_checkpointed_iteration.txt": r"--load_path .* --save_path NEW`",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("config", [False, True])
def test_the_error_for_a_directory_and_for_its_file_name_the_conversion(tmp_path, name, config):
    (tmp_path / name).write_bytes(struct.pack("<i", LLM_C_MAGIC) if name.startswith("model_0") else b"\0")
    if config:  # transformers wrote it beside flax_model.msgpack and tf_model.h5
        shape = '"vocab_size": 5, "n_positions": 4, "n_layer": 1, "n_head": 1, "n_embd": 2'
        (tmp_path / "config.json").write_text(f'{{"model_type": "gpt2", {shape}}}')
    with pytest.raises(FileNotFoundError, match=FILES[name]):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=FILES[name]):
        locate(tmp_path / name)


def test_files_of_an_unknown_kind_get_no_hint(tmp_path):
    assert conversion_hint(tmp_path) == conversion_hint(tmp_path / "none") == ""
    for name in ("train.bin", "notes.txt", "model.onnx"):
        (tmp_path / name).write_bytes(b"")
    assert conversion_hint(tmp_path) == ""
