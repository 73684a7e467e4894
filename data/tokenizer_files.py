"""Read the files of a tokenizer: either tokenizer.json, or vocab.json and merges.txt.

In OpenAI's models, vocab.json is named encoder.json, and merges.txt is named vocab.bpe.

A tokenizer.json can describe many steps that `data.tokenizer` does not have. A file with an unknown field or value is
refused, because the ids could be wrong if the field were ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tokenizers

from data.plain_text import read_utf8

END_OF_TEXT = "<|endoftext|>"

_EMPTY = (None, "")
# The values that each field of "model" in tokenizer.json may have. A dropout of 0 is the same as no dropout.
_MODEL_FIELDS: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "continuing_subword_prefix": _EMPTY,
    "end_of_word_suffix": _EMPTY,
    "fuse_unk": (False,),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
_ANY_BOOL = (True, False)
# The values that each field of a ByteLevel step may have: _SPLITTER for the pre-tokenizer, _BYTE_LEVEL for the decoder
# and the post-processor. Where True and False are both allowed, they give the same ids.
_SPLITTER = {"type": ("ByteLevel",), "add_prefix_space": (False,), "trim_offsets": _ANY_BOOL, "use_regex": (True,)}
_BYTE_LEVEL = {"type": ("ByteLevel",), "add_prefix_space": _ANY_BOOL, "trim_offsets": _ANY_BOOL, "use_regex": _ANY_BOOL}


@dataclass(frozen=True)
class Described:
    """What the files of a tokenizer describe.

    vocab: the id of each token, including those in `special`;
    merges: pairs of tokens in the order of their priority: the first pair is merged first;
    special: the special tokens, which `Tokenizer.encode` never returns;
    byte_level: whether tokens are spelled with GPT-2's characters for bytes; otherwise each token is one character.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    special: tuple[str, ...]
    byte_level: bool


def read_tokenizer_json(path: Path) -> Described:
    """Return what a tokenizer.json describes. Raises ValueError if it is damaged or a field is not understood."""
    described = _object(_parse(path), "the file")
    known = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"}
    for field in described.keys() - known - {"decoder", "model"}:
        _refuse(field, described[field], "no such field")
    if described.get("version", "1.0") != "1.0":
        _refuse("version", described["version"], '"1.0"')
    for field in ("truncation", "padding", "normalizer"):
        if described.get(field) is not None:
            # transformers saves the truncation and padding with which the tokenizer was last called, and sets both in
            # each call. Other programs apply the saved ones.
            remedy = "" if field == "normalizer" else " (load the original tokenizer with transformers, and save it)"
            _refuse(field, described[field], f"null{remedy}")
    model = _object(described.get("model"), "model")
    for field in model.keys() - _MODEL_FIELDS.keys() - {"vocab", "merges", "unk_token"}:
        _refuse(f"model.{field}", model[field], "no such field")
    _allow(model, "model", _MODEL_FIELDS, required=())
    vocab = _read_vocab(model.get("vocab"), "model.vocab")
    merges = _read_merges(model.get("merges"))
    special = _read_added(described.get("added_tokens") or [], vocab)
    byte_level = described.get("pre_tokenizer") is not None
    if model.get("unk_token") not in (None, "", *vocab):
        _refuse("model.unk_token", model["unk_token"], "null or a token of the vocabulary")
    decoder = _object(described.get("decoder"), "decoder")
    if byte_level:
        splitter = _object(described["pre_tokenizer"], "pre_tokenizer")
        _allow(splitter, "pre_tokenizer", _SPLITTER, required=("type", "add_prefix_space"), only=True)
        _allow(decoder, "decoder", _BYTE_LEVEL, required=("type",), only=True)
        if described.get("post_processor") is not None:
            _check_post_processor(_object(described["post_processor"], "post_processor"))
    else:
        _allow(decoder, "decoder", {"type": ("Fuse",)}, required=("type",), only=True)
        if described.get("post_processor") is not None:
            _refuse("post_processor", described["post_processor"], "null")
    try:
        # Other tools read the file with the library `tokenizers`, so refuse a file that this library cannot read.
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself, not a subclass
        raise ValueError(f"the library tokenizers cannot read it ({error})") from None
    return Described(vocab, merges, special, byte_level)


def _check_post_processor(processor: dict[str, Any]) -> None:
    """Raise ValueError for a post-processor that may add tokens."""
    if processor.get("type") != "TemplateProcessing":
        _allow(processor, "post_processor", _BYTE_LEVEL, required=("type",), only=True)
    elif processor.get("special_tokens") != {}:
        _refuse("post_processor.special_tokens", processor.get("special_tokens"), "no token that is added to the text")
    elif processor.get("single") != [{"Sequence": {"id": "A", "type_id": 0}}]:
        _refuse("post_processor.single", processor.get("single"), "the text alone")


def find_vocab_and_merges(directory: Path) -> tuple[Path, Path] | None:
    """Return the files with the vocabulary and the merges in a directory, or None if there are none."""
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        vocab, merges = (directory / name for name in names)
        if vocab.is_file() and merges.is_file():
            return vocab, merges
    return None


def read_vocab_and_merges(vocab_path: Path, merges_path: Path) -> Described:
    """Return what these files describe, with the special tokens of added_tokens.json if this file exists.

    Raises ValueError naming the file that is damaged or not understood.
    """
    path, directory = vocab_path, vocab_path.parent
    try:
        vocab = _read_vocab(_parse(path), "the vocabulary")
        special: list[str] = [END_OF_TEXT] if END_OF_TEXT in vocab else []
        path = directory / "added_tokens.json"
        if path.is_file():
            added = _read_vocab(_parse(path), "the file")
            listed = _special_tokens(directory)
            tokens = [
                {"content": content, "id": id, "special": content in listed or content == END_OF_TEXT}
                for content, id in sorted(added.items(), key=lambda item: item[1])
            ]
            special = list(dict.fromkeys([*special, *_read_added(tokens, vocab)]))
        path = merges_path
        lines = read_utf8(path).splitlines()
        merges = _read_merges([line for line in lines if line and not line.startswith("#version")])
        # OpenAI's vocabulary has the 256 bytes, one token for each merge, and end-of-text.
        if path.name == "vocab.bpe" and len(merges) != len(vocab) - 257:
            raise ValueError(f"it has {len(merges):,} merges, but the vocabulary needs {len(vocab) - 257:,}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    return Described(vocab, merges, tuple(special), byte_level=True)


def _special_tokens(directory: Path) -> set[str]:
    """Return the tokens that special_tokens_map.json lists, or an empty set if there is no such file."""
    path = directory / "special_tokens_map.json"
    if not path.is_file():
        return set()
    tokens: set[str] = set()
    for value in _object(_parse(path), path.name).values():
        for token in value if isinstance(value, list) else [value]:
            content = token.get("content") if isinstance(token, dict) else token
            tokens |= {content} if isinstance(content, str) else set()
    return tokens


def _parse(path: Path) -> Any:
    try:
        return json.loads(read_utf8(path))
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not complete JSON ({error})") from None


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(field, value, "an object")
    return value


def _refuse(field: str, found: Any, expected: str) -> NoReturn:
    text = json.dumps(found)
    raise ValueError(f"{field} is {text if len(text) < 80 else text[:77] + '...'}, expected {expected}")


def _allow(
    found: dict[str, Any], name: str, fields: dict[str, tuple[Any, ...]], required: tuple[str, ...], only: bool = False
) -> None:
    """Check the fields of the JSON object `found`, which is called `name` in error messages.

    `fields` has the allowed values of each field. A missing field counts as the first of these values. Raises
    ValueError if a value is not allowed, a required field is missing or, with `only`, a field is not in `fields`.
    """
    for field in [*required, *(found if only else ())]:
        if field not in found or field not in fields:
            _refuse(f"{name}.{field}", found.get(field), "no such field" if field in found else "a value")
    for field, allowed in fields.items():
        value = found.get(field, allowed[0])
        # In Python, 1 == True and 0 == False, so compare the types too. `allowed` is a tuple, because `value` may be a
        # list, which cannot be looked up in a set.
        if value not in allowed or (isinstance(value, bool) is not any(isinstance(one, bool) for one in allowed)):
            _refuse(f"{name}.{field}", value, " or ".join(map(json.dumps, allowed)))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_vocab(vocab: Any, field: str) -> dict[str, int]:
    for token, id in _object(vocab, field).items():
        if not _is_id(id):
            _refuse(f"{field}, {json.dumps(token)}", id, "a whole number")
    return dict(vocab)


def _read_merges(merges: Any) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        _refuse("model.merges", merges, "a list")
    pairs: list[tuple[str, str]] = []
    for number, merge in enumerate(merges, 1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            _refuse(f"merge {number}", merge, "two tokens")
        pairs.append((pair[0], pair[1]))
    return pairs


def _read_added(added: Any, vocab: dict[str, int]) -> tuple[str, ...]:
    """Add the special tokens in `added` to `vocab` and return them.

    Raises ValueError for an added token that is not special, because `data.tokenizer` does not support such tokens.
    """
    if not isinstance(added, list):
        _refuse("added_tokens", added, "a list")
    special: list[str] = []
    for token in added:
        content, id = _object(token, "an entry of added_tokens").get("content"), token.get("id")
        if not isinstance(content, str) or not content or content in special:
            _refuse("the content of an entry of added_tokens", content, "text, once")
        if token.get("special") is not True:
            _refuse(f"added_tokens, {content!r}, special", token.get("special"), "true")
        # The library `tokenizers` gives a new added token the next id, whatever id the file states.
        expected = vocab.get(content, len(vocab))
        if not _is_id(id) or id != expected:
            _refuse(f"added_tokens, {content!r}, id", id, str(expected))
        vocab[content] = id
        special.append(content)
    return tuple(special)
