"""Files of tokenizers: they mean what `tokenizers` makes of them, or are refused with the file and the field named."""

import copy
import json
import re
import shutil

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

TEXT = "the Tide was  out, that  tide! Ebb\n"


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """The content of tokenizer.json by kind."""
    contents = {}
    for kind in ("bpe:280", "char"):
        directory = tmp_path_factory.mktemp("tokenizer")
        train_tokenizer(kind, [TEXT]).save(directory)
        contents[kind] = json.loads((directory / "tokenizer.json").read_text())
    return contents


def theirs(path):
    """Return the ids and the text that `tokenizers` makes of the file."""
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.encode_special_tokens = True  # a literal special token in a text is ordinary text here
    ids = backend.encode(TEXT, add_special_tokens=False).ids
    return ids, backend.decode(ids, skip_special_tokens=False), backend.get_vocab_size()


def set_field(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REFUSED = [
    ("bpe:280", ["normalizer"], {"type": "Lowercase"}, "normalizer is"),
    ("bpe:280", ["pre_tokenizer", "use_regex"], False, "pre_tokenizer.use_regex is false, expected true"),
    ("bpe:280", ["pre_tokenizer", "add_prefix_space"], True, "pre_tokenizer.add_prefix_space is true"),
    ("bpe:280", ["pre_tokenizer"], {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}, "pre_tokenizer.add_prefix"),
    ("bpe:280", ["pre_tokenizer"], {"type": "Whitespace"}, "pre_tokenizer"),
    ("bpe:280", ["pre_tokenizer"], None, "decoder"),
    ("bpe:280", ["model", "dropout"], 0.1, "model.dropout is 0.1"),
    ("bpe:280", ["model", "continuing_subword_prefix"], "##", "model.continuing_subword_prefix"),
    ("bpe:280", ["model", "end_of_word_suffix"], "</w>", "model.end_of_word_suffix"),
    ("bpe:280", ["model", "ignore_merges"], True, "model.ignore_merges is true"),
    ("bpe:280", ["model", "type"], "Unigram", "model.type"),
    ("bpe:280", ["model"], [], "model is \\[\\], expected an object"),
    ("bpe:280", ["model", "vocab", "a"], "7", "model.vocab"),
    ("bpe:280", ["model", "merges", 0], ["nothing", "there"], "nothing"),
    ("bpe:280", ["model", "merges", 0], 5, "merge 1 is 5"),
    ("bpe:280", ["truncation"], {"max_length": 3, "stride": 0, "strategy": "LongestFirst"}, "truncation"),
    ("bpe:280", ["decoder"], None, "decoder is null"),
    ("bpe:280", ["added_tokens", 0, "special"], False, "special is false"),
    ("bpe:280", ["added_tokens", 0, "id"], 3, "id is 3"),
    ("bpe:280", ["surprise"], 1, "surprise is 1"),
    ("char", ["normalizer"], {"type": "NFC"}, "normalizer"),
    ("char", ["model", "dropout"], 0.5, "model.dropout"),
    ("char", ["post_processor"], BYTE_LEVEL, "post_processor"),
]


@pytest.mark.parametrize(("kind", "path", "value", "message"), REFUSED)
def test_field_that_is_not_understood_is_named(described, kind, path, value, message, tmp_path):
    edited = copy.deepcopy(described[kind])
    set_field(edited, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=rf"tokenizer\.json cannot be used: .*{message}"):
        load_tokenizer(tmp_path)


def test_vocabulary_without_all_bytes_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(special_tokens=[END_OF_TEXT]))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="of the 256 bytes have no token, such as 0x00"):
        load_tokenizer(tmp_path)


def test_special_tokens_are_kept_and_never_made_from_text(described, tmp_path):
    edited = copy.deepcopy(described["bpe:280"])
    n = len(edited["model"]["vocab"])
    edited["added_tokens"].append({**edited["added_tokens"][0], "content": "[PAD]", "id": n})
    (tmp_path / "tokenizer.json").write_text(json.dumps(edited))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == n + 1
    assert tokenizer.decode([n, tokenizer.eot]) == f"[PAD]{END_OF_TEXT}"
    assert tokenizer.token_bytes()[[n, tokenizer.eot]].tolist() == [0, 0]
    for ids in (tokenizer.encode("[PAD]"), tokenizer.encode_documents(["[PAD]"])[0].tolist()):
        assert n not in ids
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again") == tokenizer
    (tmp_path / "tokenizer.json").write_text(json.dumps(described["bpe:280"]))
    assert load_tokenizer(tmp_path) != tokenizer


def test_vocab_json_and_merges_txt(described, tmp_path):
    model = described["bpe:280"]["model"]

    lines = "\n".join(" ".join(pair) for pair in model["merges"])

    def write(vocab=model["vocab"], merges=lines):
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "vocab.json").write_text(vocab if isinstance(vocab, str) else json.dumps(vocab))
        (tmp_path / "t" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")

    write()
    expected = load_tokenizer(tmp_path / "t")
    assert expected.kind == f"bpe:{len(model['vocab'])}"
    n = len(model["vocab"])
    (tmp_path / "t" / "added_tokens.json").write_text(json.dumps({"[PAD]": n}))
    with pytest.raises(ValueError, match=r"added_tokens\.json cannot be used: .*'\[PAD\]', special is false"):
        load_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    assert load_tokenizer(tmp_path / "t").vocab_size == n + 1
    without = {token: id for token, id in model["vocab"].items() if token != END_OF_TEXT}
    for arguments, message in [
        (
            {"vocab": without},
            rf"vocab\.json and merges\.txt in .* cannot be used: there is no {re.escape(END_OF_TEXT)} token",
        ),
        ({"vocab": '{"a": 0, "b"'}, r"vocab\.json cannot be used: it is not complete JSON"),
        ({"vocab": "[1]"}, r"vocab\.json cannot be used: the vocabulary is \[1\]"),
        ({"merges": "a b\nc"}, r"merges\.txt cannot be used: merge 2 is \"c\", expected two tokens"),
        ({"vocab": {**model["vocab"], "é": 99}}, r"vocab\.json and merges\.txt in .* cannot be used"),
    ]:
        write(**arguments)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / "t")
    write(vocab=without)
    assert load_tokenizer(tmp_path / "t", add_end_of_text=True) == expected
    write()
    assert load_tokenizer(tmp_path / "t", add_end_of_text=True) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats(0, 1) | st.sampled_from(["", "a", "the", "BPE"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "id", "a"]), inner, max_size=2)
    ),
    max_leaves=3,
)
steps = st.sampled_from(
    [
        BYTE_LEVEL,
        {**BYTE_LEVEL, "use_regex": False},
        {"type": "Lowercase"},
        {"type": "Fuse"},
        {"type": "Whitespace"},
        {"type": "Sequence", "normalizers": []},
        {"type": "ByteFallback"},
    ]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_edits_load_as_tokenizers_does_or_are_refused(described, tmp_path, data):
    edited = copy.deepcopy(described[data.draw(st.sampled_from(["bpe:280", "char"]))])
    for _ in range(data.draw(st.integers(1, 2))):
        parent = edited
        key = data.draw(st.sampled_from(sorted(parent)))
        while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.integers(0, 3)):
            parent = parent[key]
            key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        if isinstance(parent, dict) and data.draw(st.integers(0, 4)) == 0:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(data.draw(values | steps))
        if not edited:
            break
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(edited))
    try:
        tokenizer = load_tokenizer(tmp_path)
    except (ValueError, OSError) as refused:
        message = str(refused)
    else:
        message = ""
    if message:
        assert "tokenizer.json" in message
        return
    ids, text, size = theirs(path)
    assert tokenizer.encode(TEXT) == ids
    assert tokenizer.encode_documents([TEXT])[0].tolist() == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == size


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000), garbage=st.binary(max_size=3))
def test_truncated_files_name_the_file(described, tmp_path, cut, garbage):
    content = json.dumps(described["bpe:280"]).encode()
    damaged = content[: min(cut, len(content) - 1)] + garbage
    assume(damaged.strip() != content)  # the last byte was put back
    (tmp_path / "tokenizer.json").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
