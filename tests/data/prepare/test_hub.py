"""Datasets of the hub: from a small hub on this machine through huggingface_hub's own code, and from local copies."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.known_datasets import PREPARE_ARGUMENTS
from data.prepare import hub
from data.prepare.__main__ import main
from data.prepare.documents import Documents, parse
from data.prepare.source import ParseOptions
from data.shards import PROGRESS_FILE, open_split, read_meta
from data.tokenizer import load_tokenizer

COMMIT = "c0ffee" + "0" * 34


class LocalHub(ThreadingHTTPServer):
    """Serves `files` (bytes by name) as one dataset under any name, at one commit.

    broken: names of files whose transfer stops after three quarters;
    fetched: names of the files that were requested.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.listed = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self.broken: set[str] = set()
        self.fetched: list[str] = []

    def describe(self, name: str) -> dict[str, object]:
        size, sha256 = len(self.files[name]), self.listed[name]
        lfs = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130}
        return {"type": "file", "path": name, "rfilename": name, "size": size, "oid": sha256[:40], "lfs": lfs}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self.json([self.server.describe(name) for name in asked if name in self.server.files])

    def do_GET(self) -> None:
        files, path = self.server.files, unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/datasets/[^/]+/[^/]+/tree/[^/]+/?(.*)", path):
            inside = [name for name in files if str(Path(name).parent) == (found[1] or ".")]
            folders = {str(Path(name).parent) for name in files if not found[1]} - {"."}
            listed = [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
            self.json([*listed, *map(self.server.describe, inside)])
        elif re.fullmatch(r"/api/datasets/[^/]+/[^/]+(/revision/[^/]+)?", path):
            self.json({"id": "a/b", "sha": COMMIT, "siblings": [self.server.describe(name) for name in files]})
        elif (found := re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)) and found[1] in files:
            self.send_file(found[1], files[found[1]])
        else:
            self.answer(404, b"", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def send_file(self, name: str, data: bytes) -> None:
        etag = f'"{self.server.listed[name]}"'
        if self.command == "GET":
            self.server.fetched.append(name)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        begin, end = (int(asked[1]), int(asked[2] or len(data) - 1) + 1) if asked else (0, len(data))
        headers = {"ETag": etag, "Accept_Ranges": "bytes"}
        if asked:
            headers["Content_Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        if name in self.server.broken and self.command == "GET":
            headers["Content_Length"] = str(end - begin)
            self.answer(206 if asked else 200, data[begin : max(begin, len(data) * 3 // 4)], **headers)
            self.close_connection = True
        else:
            self.answer(206 if asked else 200, data[begin:end], **headers)


@pytest.fixture
def prepare_from(python, tmp_path):
    """`prepare_from(server, ...)`: run `data.prepare` with this server instead of the Hugging Face hub."""

    def run(server: LocalHub, *arguments: object) -> CompletedProcess[str]:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = python("-m", "data.prepare", *arguments, check=False, timeout=120, **environment)
        server.shutdown()
        assert "Traceback" not in done.stderr
        return done

    return run


def parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def test_dataset_is_read_from_the_hub(prepare_from, tmp_path):
    server = LocalHub(
        {
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n",
            "data/train-00000-of-00002.parquet": parquet(["one", "two", "three"]),
            "data/train-00001-of-00002.parquet": parquet(["four"]),
        }
    )
    done = prepare_from(server, "hf", "a/b", "--val-fraction", 0, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    meta = read_meta(tmp_path / "out")
    assert (meta.source, meta.revision, meta.documents["train"]) == ("hf a/b", COMMIT, 4)
    split = open_split(tmp_path / "out", "train")
    tokens = np.empty(split.n_tokens, np.uint16)
    split.read(0, tokens)
    text = load_tokenizer("gpt2").decode(tokens.tolist())
    assert text == "".join(f"<|endoftext|>{word}" for word in ("one", "two", "three", "four"))


def test_interrupted_and_damaged_downloads_of_shards_are_repeated(prepare_from, tmp_path):
    files = {"README.md": b"shards"}
    counts = {"fineweb_val_000000.bin": 8_000, "fineweb_train_000001.bin": 5_000}
    for name, count in counts.items():
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        files[name] = header.tobytes() + np.full(count, 262, "<u2").tobytes()
    server = LocalHub(files)
    server.broken = {"fineweb_val_000000.bin"}
    out = tmp_path / "out"
    done = prepare_from(server, "download", "fineweb-10b", "--out", out)
    assert done.returncode == 2
    assert "fineweb_val_000000.bin could not be downloaded" in done.stderr
    with pytest.raises(ValueError, match="not complete"):
        open_split(out, "train")
    # Files that are complete are not downloaded again.
    server = LocalHub(files)
    server.files = files | {"fineweb_val_000000.bin": files["fineweb_val_000000.bin"][:-1] + b"\0"}
    done = prepare_from(server, "download", "fineweb-10b", "--out", out)
    assert server.fetched == ["fineweb_val_000000.bin"]
    assert done.returncode == 2
    assert "fineweb_val_000000.bin was damaged in the download (wrong sha256) and has been removed" in done.stderr
    done = prepare_from(LocalHub(files), "download", "fineweb-10b", "--out", out)
    assert done.returncode == 0, done.stderr
    for split, count in (("train", 5_000), ("val", 8_000)):
        opened = open_split(out, split)
        opened.verify()
        assert opened.n_tokens == count


def hub_copy(directory: Path) -> Path:
    """Write the files of a dataset as they are on the hub, with two configurations, and return the directory."""
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


def test_local_copy_of_a_hub_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = hub_copy(tmp_path / "copy")
    main(["hf", str(copy), "--out", str(tmp_path / "all")])
    assert texts_of(tmp_path / "all", "train") == ["one", "two", "three"]
    assert texts_of(tmp_path / "all", "val") == ["held out"]
    main(["hf", str(copy), "--name", "small", "--val-fraction", "0", "--out", str(tmp_path / "small")])
    assert texts_of(tmp_path / "small", "train") == ["one", "two"]
    main(["tinystories", "--from", str(copy), "--out", str(tmp_path / "preset")])
    assert (tmp_path / "preset/train_000000.bin").read_bytes() == (tmp_path / "all/train_000000.bin").read_bytes()
    for options, message in [
        (["--name", "none"], "'none' not found"),
        (["--split", "test"], "no split 'test', only train"),
    ]:
        with pytest.raises(SystemExit):
            main(["hf", str(copy), *options, "--out", str(tmp_path / "no")])
        assert message in capsys.readouterr().err


def test_files_on_the_hub_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    main(["hf", "a/b", "--val-fraction", "0", "--out", str(tmp_path / "out")])
    assert texts_of(tmp_path / "out", "train") == ["one", "two", "three"]
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert (meta.source, meta.revision) == ("hf a/b", commit)

    Remote.broken = True
    source = hub.hub_source("a/b", None, None, ParseOptions())
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
    source = hub.hub_source(str(tmp_path / "copy"), None, None, ParseOptions(), articles=True)
    for limit in (1, 1000):
        documents = Documents()
        for chunk in source.read(source.files[0], limit):
            parse(chunk, source.options, documents)
        first, second = documents.texts
        assert first.decode() == " = First = \n Text . \n = = Part = = \n More . \n"
        assert second.decode() == " = Second = \n End . \n"


def test_articles_continue_in_the_next_file_of_a_saved_dataset(tmp_path: Path) -> None:
    files = [
        [" = First = \n", " Text . \n", " = Second = \n", " Begin . \n"],
        [" Middle . \n", ""],
        [" End . \n", " = Third = \n", " Text . \n"],
    ]
    for n, rows in enumerate(files):
        table = pyarrow.table({"text": rows})
        with pyarrow.ipc.new_stream(tmp_path / f"{n}.arrow", table.schema) as writer:
            writer.write_table(table)
    names = [{"filename": f"{n}.arrow"} for n in range(3)]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": names}))
    source = hub.hub_source(str(tmp_path), None, None, ParseOptions(), articles=True)
    for limit in (1, 1000):
        found = []
        for file in source.files:
            documents = Documents()
            for chunk in source.read(file, limit):
                parse(chunk, source.options, documents)
            found.append([text.decode() for text in documents.texts])
        second = " = Second = \n Begin . \n Middle . \n End . \n"
        assert found == [[" = First = \n Text . \n", second], [], [" = Third = \n Text . \n"]]


def test_unreachable_hub_is_explained(python: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    for arguments in (["fineweb-edu-10b"], ["hf", "some/dataset"], ["download", "fineweb-10b"]):
        done = python("-m", "data.prepare", *arguments, "--out", tmp_path / "out", check=False, **environment)
        assert done.returncode == 2
        assert "cannot reach dataset" in done.stderr
        assert "Traceback" not in done.stderr


def test_downloaded_shards_are_checked(
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
    main(["download", "fineweb-10b"])
    directory = tmp_path / "data" / "fineweb-10b"
    train, val = open_split(directory, "train"), open_split(directory, "val")
    assert (train.n_tokens, val.n_tokens) == (2000, 1000)
    train.verify()
    # A download that was killed before it deleted the progress file is completed.
    (directory / PROGRESS_FILE).write_text('{"settings": {}}')
    main(["download", "fineweb-10b"])
    open_split(directory, "train").verify()

    data = bytearray((theirs / "fineweb_train_000002.bin").read_bytes())
    data[-1] ^= 1
    (theirs / "fineweb_train_000002.bin").write_bytes(data)
    with pytest.raises(SystemExit):
        main(["download", "fineweb-10b", "--out", str(tmp_path / "again")])
    assert "fineweb_train_000002.bin was damaged in the download" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not complete"):
        open_split(tmp_path / "again", "train")
    (tmp_path / "again" / "tokenizer.json").unlink()
    (tmp_path / "again" / "tokenizer.json").symlink_to(tmp_path / "outside")
    with pytest.raises(SystemExit):
        main(["download", "fineweb-10b", "--out", str(tmp_path / "again")])
    assert "tokenizer.json is a link, which would be written through" in capsys.readouterr().err
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | {"source": "hf another/dataset"}))
    with pytest.raises(SystemExit):
        main(["download", "fineweb-10b"])
    assert "prepared with other options (source 'hf another/dataset', now " in capsys.readouterr().err


def test_presets_are_among_the_known_datasets() -> None:
    """The error for a missing dataset directory that is named like a preset proposes that preset."""
    assert {name: PREPARE_ARGUMENTS.get(name) for name in hub.PRESETS} == {name: name for name in hub.PRESETS}
