"""Read a GPT-2 from files in OpenAI's original format, without TensorFlow:

    hparams.json                      the shape of the model
    checkpoint                        names the newest checkpoint, usually model.ckpt
    model.ckpt.index                  name, type, shape and place of each tensor: a LevelDB table of protocol buffers
    model.ckpt.data-00000-of-00001    the tensors, little-endian, one after the other
    encoder.json, vocab.bpe           the tokenizer, which data/tokenizer.py reads

Each block of the table and each tensor is stored with its CRC32C, a checksum. This module verifies these checksums.

Formats: https://github.com/google/leveldb/blob/main/doc/table_format.md for the table, and
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto for its values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from torch import Tensor

FOOTER_SIZE = 48  # bytes at the end of a table: two handles (offset and size of a block), padding, MAGIC
MAGIC = 0xDB4775248B80FB57
TRAILER_SIZE = 5  # bytes after each block: its compression (1 byte, 0: none) and its CRC32C (4 bytes)
CRC_MASK = 0xA282EAD8  # added to a rotated CRC32C: see `masked_crc32c`

# TensorFlow's code for a data type (types.proto) -> PyTorch's dtype.
DTYPES = {1: torch.float32, 2: torch.float64, 14: torch.bfloat16, 19: torch.float16}
# Field of hparams.json -> transformers' name for it in config.json.
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}


class Place(NamedTuple):
    """Where a tensor is stored, as model.ckpt.index describes it."""

    dtype: int  # a key of DTYPES
    shape: tuple[int, ...]
    shard: int  # index of the data file: 0 is data-00000
    offset: int  # in bytes, from the beginning of the data file
    size: int  # in bytes
    crc: int  # masked CRC32C of the bytes


def is_openai_checkpoint(directory: Path) -> bool:
    """Return whether a directory has OpenAI's layout. transformers' layout, with config.json, has precedence."""
    if (directory / "config.json").is_file():
        return False
    return (directory / "hparams.json").is_file() or (directory / "checkpoint").is_file()


def convert_hparams(hparams: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the fields of config.json that correspond to those of the hparams.json at `path`.

    Raises ValueError, naming the fields, if fields are missing, or if there are fields that GPT-2's file does not have.
    """
    if missing := [name for name in HPARAMS if name not in hparams]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    if unknown := [name for name in hparams if name not in HPARAMS]:
        raise ValueError(f"{path} has {', '.join(unknown)}, but only GPT-2's {', '.join(HPARAMS)} are implemented")
    return {"model_type": "gpt2"} | {theirs: hparams[name] for name, theirs in HPARAMS.items()}


def read_openai_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in transformers, memory-mapped tensor) for each tensor. The largest tensor comes first.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, truncated or not in TensorFlow's format. The message names the file.
    """
    prefix = find_prefix(directory)
    index = prefix.with_name(f"{prefix.name}.index")
    try:
        n_shards, places = read_index(index.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory / 'checkpoint'} names {prefix.name}, but there is no {index}") from None
    except ValueError as error:
        raise ValueError(f"{index} cannot be read ({error}): download or copy it again") from None
    shards = {place.shard for place in places.values()}
    files = {shard: prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{n_shards:05d}") for shard in shards}
    for shard, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"{index} describes tensors in {file}, which does not exist: download or copy it")
        expected = max(place.offset + place.size for place in places.values() if place.shard == shard)
        if (found := file.stat().st_size) != expected:
            raise ValueError(f"{file} has {found:,} bytes, but its index says {expected:,}: download or copy it again")
    for name, place in sorted(places.items(), key=lambda item: -item[1].size):
        yield transformers_name(name), read_tensor(files[place.shard], name, place)


def find_prefix(directory: Path) -> Path:
    """Return the common beginning of the paths of a checkpoint's files, such as DIR/model.ckpt.

    The file `checkpoint` in the directory names the checkpoint.

    Raises:
        FileNotFoundError: there is no file `checkpoint`.
        ValueError: the file `checkpoint` is damaged, or names another directory.
    """
    path = directory / "checkpoint"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{directory} has no file `checkpoint`, which names the checkpoint: download or copy it"
        ) from None
    except UnicodeDecodeError:
        text = ""
    found = re.search(r'^\s*model_checkpoint_path\s*:\s*"([^"\\\0]+)"', text, re.MULTILINE)
    if found is None:
        raise ValueError(f'{path} has no line model_checkpoint_path: "model.ckpt": download or copy it again')
    prefix = directory / found[1]
    if prefix.parent.resolve() != directory.resolve() or prefix.name == "..":
        raise ValueError(f"{path} names {found[1]!r}, expected a checkpoint in the same directory, such as model.ckpt")
    return directory / prefix.name


def transformers_name(name: str) -> str:
    """Return transformers' name of OpenAI's variable `name`: model/h3/ln_1/g is transformer.h.3.ln_1.weight."""
    found = re.fullmatch(r"model/(?:h(\d+)/)?(\w+(?:/\w+)*?)(?:/([wgb]))?", name)
    if found is None:
        return name  # not a name of GPT-2's: `weights.load_weights` reports it
    layer = "" if found[1] is None else f"h.{found[1]}."
    return f"transformer.{layer}{found[2].replace('/', '.')}.{'bias' if found[3] == 'b' else 'weight'}"


def read_tensor(file: Path, name: str, place: Place) -> Tensor:
    """Return a tensor, without the leading dimension of 1 that the weights of OpenAI's 1-D convolutions have.

    Raises ValueError, naming file and tensor, if the checksum of its bytes is not `place.crc`.
    """
    mapped = np.memmap(file, np.uint8, "c", place.offset, place.size)  # "c": writable in memory, as from_numpy expects
    view = mapped.view()
    view.flags.writeable = False  # the function for the checksum accepts only read-only arrays
    if masked_crc32c(view) != place.crc:
        raise ValueError(f"{file} is damaged: the checksum of {name} is wrong; download or copy it again")
    tensor = torch.from_numpy(mapped).view(DTYPES[place.dtype]).view(place.shape)
    return tensor.squeeze(0) if tensor.dim() == 3 else tensor


# ---------------------------------------------------------------------------------------------------------------------
# The index: a table that maps the names of tensors to protocol buffers
#
# If the data is damaged, the functions below raise ValueError, and `read_openai_tensors` adds the name of the file.


def read_index(data: bytes) -> tuple[int, dict[str, Place]]:
    """Return the number of data files and the place of each tensor by name."""
    entries = dict(read_table(data))
    header = read_message(entries.pop(b"", b""))  # a BundleHeaderProto: number of shards, endianness, version
    n_shards = _number(header, 1)
    if _number(header, 2) != 0:
        raise ValueError("the tensors are big-endian, expected little-endian")
    places = {key.decode(): _read_place(value) for key, value in entries.items()}  # UnicodeDecodeError is a ValueError
    if not places:
        raise ValueError("it describes no tensor")
    for name, place in places.items():
        if place.dtype not in DTYPES:
            raise ValueError(f"{name} has TensorFlow's data type {place.dtype}, expected one of floating-point numbers")
        if place.shard >= n_shards:
            raise ValueError(f"{name} is in data file {place.shard}, but there are only {n_shards}")
        if not 0 < place.size == math.prod(place.shape) * DTYPES[place.dtype].itemsize:
            raise ValueError(f"{name} has {place.size:,} bytes, which do not match its shape {place.shape}")
    return n_shards, places


def _read_place(value: bytes) -> Place:
    """Read a BundleEntryProto: field 1 is dtype, 2 shape, 3 shard, 4 offset, 5 size, 6 crc32c, 7 slices."""
    entry = read_message(value)
    if 7 in entry:
        raise ValueError("a tensor is divided into slices, which is not supported: save it as one tensor")
    dimensions = read_message(_data(entry, 2)).get(2, [])  # TensorShapeProto: field 2 is the dimensions
    shape = tuple(_number(read_message(dim), 1) for dim in dimensions if isinstance(dim, bytes))  # field 1 is the size
    return Place(_number(entry, 1), shape, *(_number(entry, field) for field in (3, 4, 5, 6)))


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a LevelDB table. Raises ValueError if the table is damaged."""
    footer = data[-FOOTER_SIZE:]
    if len(footer) < FOOTER_SIZE or int.from_bytes(footer[-8:], "little") != MAGIC:
        raise ValueError(f"its {len(data):,} bytes do not end like a TensorFlow index")
    statistics, end = _read_handle(footer, 0)
    list(read_block(data, *statistics))  # read only to verify its checksum: TensorFlow leaves this block empty
    handle, _ = _read_handle(footer, end)
    for _, value in read_block(data, *handle):  # each value in this block is the handle of another block
        yield from read_block(data, *_read_handle(value, 0)[0])


def read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Verify the checksum of a block of a table, then yield the keys and values of the block.

    A key may be stored without the beginning that it has in common with the previous key. The block ends with the
    offsets of the keys that are stored completely (not read here), and the number of these offsets.
    """
    block, trailer = data[offset : offset + size + 1], data[offset + size + 1 : offset + size + TRAILER_SIZE]
    if len(trailer) < TRAILER_SIZE - 1 or int.from_bytes(trailer, "little") != masked_crc32c(block):
        raise ValueError(f"the checksum of its block at byte {offset:,} is wrong")
    if block[-1] != 0:
        raise ValueError("its blocks are compressed, and TensorFlow writes them uncompressed")
    n_restarts = int.from_bytes(block[-5:-1], "little")
    end = size - 4 * (n_restarts + 1)
    at, key = 0, b""
    while at < end:
        shared, at = read_varint(block, at)
        rest, at = read_varint(block, at)
        length, at = read_varint(block, at)
        if shared > len(key) or at + rest + length > end:
            raise ValueError(f"an entry of its block at byte {offset:,} is longer than the block")
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _read_handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Read the handle that begins at byte `at`. Return (offset, size) of its block, and where the next field begins."""
    offset, at = read_varint(data, at)
    size, at = read_varint(data, at)
    return (offset, size), at


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the integer at byte `at`, stored as groups of 7 bits, lowest first, and where the next field begins."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("it ends inside an integer")


def read_message(data: bytes) -> dict[int, list[int | bytes]]:
    """Return the values in a protocol buffer by field number (https://protobuf.dev/programming-guides/encoding)."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        wire_type = tag & 7
        value: int | bytes
        if wire_type == 0:
            value, at = read_varint(data, at)
        elif wire_type in (1, 2, 5):
            length, at = read_varint(data, at) if wire_type == 2 else (8 if wire_type == 1 else 4, at)
            value, at = data[at : at + length], at + length
            if wire_type != 2:
                value = int.from_bytes(value, "little")
        else:
            raise ValueError(f"a protocol buffer in it has the unknown wire type {wire_type}")
        if at > len(data):
            raise ValueError("it ends inside a protocol buffer")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(message: dict[int, list[int | bytes]], field: int) -> int:
    """Return the number in a field of a protocol buffer. A missing field means 0: protocol buffers omit zeros."""
    value = message.get(field, [0])[-1]
    return value if isinstance(value, int) else 0


def _data(message: dict[int, list[int | bytes]], field: int) -> bytes:
    """Return the bytes in a field of a protocol buffer, or b"" if the field is missing."""
    value = message.get(field, [b""])[-1]
    return value if isinstance(value, bytes) else b""


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """Return the masked CRC32C of data: the CRC32C, rotated by 15 bits, plus CRC_MASK.

    LevelDB and TensorFlow store this number. An array must be read-only, which the package google_crc32c requires.
    """
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + CRC_MASK) & 0xFFFFFFFF
