"""Test that a GPT-2 in OpenAI's own files is loaded exactly, and that a damaged file is named.

tests/fixtures/openai was written by TensorFlow 2.21 from `make_model`. The other checkpoints here are written by
TensorFlow, where it is installed, or by `write_checkpoint`, which follows the documentation of the format.
"""

import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import google_crc32c
import huggingface_hub
import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from data.tokenizer import load_tokenizer
from eval.run import main as evaluate
from model import GPT
from openai_checkpoint import find_prefix, read_index, read_openai_tensors, read_varint
from pretrained import load_model
from sample import main as sample

FIXTURE = Path(__file__).parent / "fixtures/openai"
WRITER = Path(__file__).parent / "write_tensorflow_checkpoint.py"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
HPARAMS = {"n_vocab": 260, "n_ctx": 8, "n_embd": 8, "n_head": 2, "n_layer": 2}


def make_model(dtype=torch.float32):
    """Return transformers' model of this shape with weights that any computer calculates exactly."""
    special = {"bos_token_id": 259, "eos_token_id": 259}
    config = GPT2Config(vocab_size=260, n_positions=8, n_embd=8, n_head=2, n_layer=2, **special)
    model = GPT2LMHeadModel(config).eval().to(dtype)
    for i, parameter in enumerate(model.parameters()):
        steps = torch.arange(parameter.numel()) * 7919 + 31 * i
        parameter.data.copy_(((steps % 1009 - 504) / 1024).view_as(parameter))
    return model


def openai_variables(model):
    """Return the arrays by the names of OpenAI's code (https://github.com/openai/gpt-2/blob/master/src/model.py)."""
    arrays = {}
    for name, parameter in model.transformer.named_parameters():
        *path, leaf = name.replace("h.", "h", 1).split(".") if name.startswith("h.") else name.split(".")
        array = parameter.detach().numpy()
        if path[-1].startswith("c_") and leaf == "weight":
            array = array[None]  # the weight of a 1-D convolution over one token: (1, inputs, outputs)
        leaf = {"weight": "g" if path[-1].startswith("ln_") else "w", "bias": "b"}[leaf]
        arrays["/".join(["model", *path, *([] if path[-1] in ("wte", "wpe") else [leaf])])] = array
    return arrays


# ---- a writer, from the documentation of the format


def varint(value):
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def field(number, value):
    """Return a field of a protocol buffer: an integer, or bytes with their length."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def masked(data):
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) & 0xFFFFFFFF


def block(entries, offset, compression=0):
    """Return a block of a table, and the handle of it. Every second key is stored completely."""
    body, restarts, previous = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % 2 == 0:
            restarts.append(len(body))
        else:
            shared = next((n for n, (a, b) in enumerate(zip(key, previous, strict=False)) if a != b), len(previous))
        body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    body += b"".join(struct.pack("<I", place) for place in [*(restarts or [0]), len(restarts) or 1])
    body += bytes([compression])
    return body + struct.pack("<I", masked(body)), varint(offset) + varint(len(body) - 1)


def table(entries, per_block=5, compression=0):
    out, handles = b"", []
    for start in range(0, len(entries), per_block):
        part = entries[start : start + per_block]
        written, handle = block(part, len(out), compression)
        out += written
        handles.append((part[-1][0], handle))
    statistics, statistics_handle = block([], len(out))
    out += statistics
    index, index_handle = block(handles, len(out))
    footer = (statistics_handle + index_handle).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    return out + index + footer


DTYPES = {"float32": 1, "float64": 2, "int32": 3, "float16": 19}


def bundle_entry(array, offset, crc, extra=b""):
    shape = b"".join(field(2, field(1, n)) for n in array.shape)
    numbers = {3: 0, 4: offset, 5: array.nbytes}
    body = field(1, DTYPES[array.dtype.name]) + field(2, shape)
    body += b"".join(field(number, value) for number, value in numbers.items() if value)
    return body + varint(6 << 3 | 5) + struct.pack("<I", crc) + extra


def write_checkpoint(directory, variables, *, compression=0, big_endian=False, extra=b"", hparams=HPARAMS):
    directory.mkdir(exist_ok=True)
    data, entries = b"", [(b"", field(1, 1) + (field(2, 1) if big_endian else b""))]
    for name in sorted(variables):
        array = np.ascontiguousarray(variables[name])
        entries.append((name.encode(), bundle_entry(array, len(data), masked(array.tobytes()), extra)))
        data += array.tobytes()
    (directory / DATA).write_bytes(data)
    (directory / INDEX).write_bytes(table(entries, compression=compression))
    (directory / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    (directory / "hparams.json").write_text(json.dumps(hparams))
    return directory


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def copy(tmp_path):
    """Return a copy of the fixture that the test damages."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "copy"))


def assert_same_logits(ours, theirs):
    ids = torch.arange(24).view(3, 8) * 10
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.2  # not all equal


# ---- what is loaded


def test_the_files_that_tensorflow_wrote_give_the_logits_of_transformers(model):
    ours, tokenizer, name = load_model(str(FIXTURE))
    assert name == str(FIXTURE)
    assert not ours.training
    assert ours.config.vocab_size == tokenizer.vocab_size == 260
    assert_same_logits(ours, model)
    for name, tensor in read_openai_tensors(FIXTURE):
        expected = model.get_parameter(name)
        assert torch.equal(tensor, expected), name


def test_the_tokenizer_of_the_directory_is_that_of_its_two_files():
    tokenizer = load_tokenizer(FIXTURE)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("the hat")] == ["the", " ", "h", "at"]
    assert tokenizer.eot == 259


def test_gpt2s_own_files_give_gpt2s_tokenizer(tokenizer, tmp_path):
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.merges)
    (tmp_path / "encoder.json").write_text(json.dumps(tokenizer.vocab))
    (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    assert load_tokenizer(tmp_path).kind == "gpt2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_another_writer_of_the_format_is_read(tmp_path, dtype):
    theirs = make_model(dtype)
    ours = GPT.from_pretrained(write_checkpoint(tmp_path / "ours", openai_variables(theirs)))
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    assert_same_logits(ours.float(), theirs.float())


@pytest.mark.slow
def test_tensorflow_writes_what_is_read(tmp_path, model):
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed: pip install tensorflow-cpu")
    np.savez(tmp_path / "arrays.npz", **openai_variables(model))
    write_checkpoint(tmp_path / "theirs", {})  # hparams.json; the rest is replaced
    run = [sys.executable, str(WRITER), str(tmp_path / "arrays.npz"), str(tmp_path / "theirs")]
    subprocess.run(run, check=True, capture_output=True)
    assert_same_logits(GPT.from_pretrained(tmp_path / "theirs"), model)
    assert (tmp_path / "theirs" / DATA).read_bytes() == (FIXTURE / DATA).read_bytes()


@pytest.mark.parametrize(
    ("name", "hub"), [("117M", "gpt2"), ("345M", "gpt2-medium"), ("774M", "gpt2-large"), ("1558M", "gpt2-xl")]
)
def test_openais_names_stand_for_those_of_the_hub(monkeypatch, tmp_path, name, hub):
    wanted = []

    def snapshot_download(name, allow_patterns):
        wanted.append(name)
        return str(FIXTURE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    GPT.from_pretrained(name)
    assert set(wanted) == {hub}
    shutil.copytree(FIXTURE, tmp_path / name)  # a directory of that name comes first
    wanted.clear()
    GPT.from_pretrained(name)
    assert not wanted


def test_sample_reads_the_directory(capsys):
    sample(["--model", str(FIXTURE), "--prompt", "the", "--greedy", "--max-new-tokens", "4", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the")


def test_the_directory_is_evaluated(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the hat that he has " * 4)
    evaluate(
        ["--model", str(FIXTURE), "--tasks", "perplexity", "--text", str(tmp_path / "text.txt"), "--device", "cpu"]
    )
    assert "perplexity" in capsys.readouterr().out


def test_a_saved_model_has_transformers_layout_and_the_same_weights(tmp_path, model):
    GPT.from_pretrained(FIXTURE).save_pretrained(tmp_path)
    assert_same_logits(GPT.from_pretrained(tmp_path), GPT2LMHeadModel.from_pretrained(tmp_path))


# ---- what is refused


@pytest.mark.parametrize("name", ["checkpoint", "hparams.json", INDEX, DATA])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        GPT.from_pretrained(copy)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/model.ckpt", "expected a checkpoint in the same directory"),
        ("../model.ckpt", "expected a checkpoint in the same directory"),
        ("sub/model.ckpt", "expected a checkpoint in the same directory"),
        ("..", "expected a checkpoint in the same directory"),
        (".", "expected a checkpoint in the same directory"),
        ("", 'no line model_checkpoint_path: "model.ckpt"'),
        ("other.ckpt", r"there is no .*other\.ckpt\.index"),
    ],
)
def test_the_checkpoint_must_be_in_the_directory(copy, path, message):
    (copy / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n')
    with pytest.raises((ValueError, FileNotFoundError), match=rf"checkpoint.*{message}"):
        GPT.from_pretrained(copy)


def test_an_absolute_path_into_the_directory_is_followed(copy):
    (copy / "checkpoint").write_text(f'all_x: "y"\nmodel_checkpoint_path: "{copy}/model.ckpt"\n')
    assert find_prefix(copy) == copy / "model.ckpt"
    (copy / "checkpoint").write_bytes(b'model_checkpoint_path: "\xff"')
    with pytest.raises(ValueError, match="has no line model_checkpoint_path"):
        find_prefix(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, r"n_embd \(8\) must be divisible by n_head \(3\)"),
        ({"n_layer": "2"}, "n_layer must be a positive integer, got '2'"),
        ({"n_layer": 3}, r"do not match its hparams\.json: missing: transformer\.h\.2"),
        ({"n_ctx": 9}, r"do not match its hparams\.json: misshapen: transformer\.wpe\.weight \(8, 8\)"),
        ({"n_ctx": None}, r"hparams\.json: n_positions must be a positive integer"),
        ({"scale": 1}, r"hparams\.json has scale, but only GPT-2's n_vocab, .* are implemented"),
    ],
)
def test_hparams_that_do_not_fit_are_refused_by_name(copy, changes, message):
    (copy / "hparams.json").write_text(json.dumps(HPARAMS | changes))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(copy)


def test_a_missing_field_and_a_truncated_hparams_json_are_named(copy):
    (copy / "hparams.json").write_text('{"n_ctx": 8, "n_embd": 8}')
    with pytest.raises(ValueError, match=r"hparams\.json lacks n_vocab, n_head, n_layer"):
        GPT.from_pretrained(copy)
    (copy / "hparams.json").write_text('{"n_ctx": 8, "n_em')
    with pytest.raises(ValueError, match=r"hparams\.json is not JSON"):
        GPT.from_pretrained(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 1}, r"model\.ckpt\.index cannot be read \(its blocks are compressed"),
        ({"big_endian": True}, "the tensors are big-endian"),
        ({"extra": field(7, b"")}, "a tensor is divided into slices"),
        ({"extra": field(3, 1)}, "is in data file 1, but there are only 1"),
        ({"extra": field(5, 1)}, "has 1 bytes"),
        ({"extra": field(5, 2**63)}, "has 9,223,372,036,854,775,808 bytes"),
        ({"extra": field(4, 2**40)}, r"data-00000-of-00001 has 15,616 bytes, but its index says 1,099,"),
        ({"extra": field(1, 3)}, "has TensorFlow's data type 3, expected one of floating-point numbers"),
        ({"extra": b"\x0b"}, "unknown wire type 3"),
        ({"extra": b"\x0a\x05abc"}, "it ends inside a protocol buffer"),
        ({"extra": b"\x80"}, "it ends inside an integer"),
    ],
)
def test_what_tensorflow_would_not_write_for_gpt2_is_refused(tmp_path, model, options, message):
    directory = write_checkpoint(tmp_path / "odd", openai_variables(model), **options)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(directory)


def test_variables_that_gpt2_does_not_have_are_listed(tmp_path, model):
    variables = openai_variables(model) | {"global_step": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match="unknown: global_step"):
        GPT.from_pretrained(write_checkpoint(tmp_path / "more", variables))
    with pytest.raises(ValueError, match="describes no tensor"):
        GPT.from_pretrained(write_checkpoint(tmp_path / "none", {}))


def test_truncated_vocabularies_are_named(copy):
    (copy / "vocab.bpe").write_text("#version: 0.2\nh e\n")
    with pytest.raises(ValueError, match=r"vocab\.bpe cannot be used: it has 1 merges, but the vocabulary needs 3"):
        load_model(str(copy))
    (copy / "encoder.json").write_text((copy / "encoder.json").read_text()[:-9])
    with pytest.raises(ValueError, match=r"encoder\.json cannot be used: it is not complete JSON"):
        load_model(str(copy))


# The sizes of the fixture's files, so that hypothesis can choose a byte without reading them.
SIZES = {name: (FIXTURE / name).stat().st_size for name in (INDEX, DATA)}
BYTES = st.sampled_from([INDEX, DATA]).flatmap(
    lambda name: st.tuples(st.just(name), st.integers(0, SIZES[name] - 1), st.integers(1, 255))
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("scratch") / "copy"))


@pytest.fixture(scope="module")
def tensors():
    return {name: tensor.clone() for name, tensor in read_openai_tensors(FIXTURE)}


@hypothesis.given(BYTES)
@hypothesis.example((INDEX, SIZES[INDEX] - 48 - 33, 1))  # in the block of statistics
@hypothesis.settings(max_examples=200, deadline=None)
def test_a_changed_byte_changes_no_tensor_or_is_reported_with_the_file(scratch, tensors, change):
    name, place, flip = change
    damaged = bytearray((FIXTURE / name).read_bytes())
    damaged[place] ^= flip
    (scratch / name).write_bytes(damaged)
    found, error = {}, None
    try:
        found = dict(read_openai_tensors(scratch))
    except ValueError as raised:
        error = raised
    shutil.copy(FIXTURE / name, scratch / name)
    if error is not None:
        assert name in str(error)
    else:
        # Only the padding of the footer is not checked.
        assert name == INDEX
        assert place >= SIZES[INDEX] - 48
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@hypothesis.given(BYTES, st.booleans())
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_truncated_or_extended_file_is_reported_by_name(scratch, change, longer):
    name, place, _ = change
    content = (FIXTURE / name).read_bytes()
    (scratch / name).write_bytes(content + bytes(place + 1) if longer else content[:place])
    try:
        with pytest.raises(ValueError, match=re.escape(name)):
            list(read_openai_tensors(scratch))
    finally:
        shutil.copy(FIXTURE / name, scratch / name)


@hypothesis.given(st.binary(max_size=200))
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_bytes_are_an_index_or_a_value_error(data):
    with pytest.raises(ValueError, match=r"."):
        read_index(data)
    for valid_block in (data, field(2, data)):
        written, handle = block([(b"", field(1, 1)), (b"name", valid_block)], 0)
        statistics, statistics_handle = block([], len(written))
        written += statistics
        index, index_handle = block([(b"name", handle)], len(written))
        footer = (statistics_handle + index_handle).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
        with pytest.raises(ValueError, match=r"."):
            read_index(written + index + footer)


def test_varints():
    for value in (0, 1, 127, 128, 300, 2**32, 2**64 - 1):
        assert read_varint(b"x" + varint(value) + b"y", 1) == (value, 1 + len(varint(value)))
    with pytest.raises(ValueError, match="ends inside an integer"):
        read_varint(b"\xff" * 11, 0)
