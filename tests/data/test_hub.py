"""Datasets of the hub through huggingface_hub's own code, against a small hub on this machine."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.shards import open_split, read_meta
from data.tokenizer import load_tokenizer

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves `files` (bytes by name) as one dataset under any name, at one commit.

    broken: names whose transfer ends after three quarters; fetched: what was asked for.
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
    server: Hub

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
def prepare(python, tmp_path):
    """`prepare(hub, ...)`: the command, with this hub in the place of the real one."""

    def run(hub: Hub, *arguments: object) -> CompletedProcess[str]:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = python("-m", "data.prepare", *arguments, check=False, timeout=120, **environment)
        hub.shutdown()
        assert "Traceback" not in done.stderr
        return done

    return run


def parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def test_a_dataset_is_read_from_the_hub(prepare, tmp_path):
    hub = Hub(
        {
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n",
            "data/train-00000-of-00002.parquet": parquet(["one", "two", "three"]),
            "data/train-00001-of-00002.parquet": parquet(["four"]),
        }
    )
    done = prepare(hub, "hf", "a/b", "--val-fraction", 0, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    meta = read_meta(tmp_path / "out")
    assert (meta.source, meta.revision, meta.documents["train"]) == ("hf a/b", COMMIT, 4)
    split = open_split(tmp_path / "out", "train")
    tokens = np.empty(split.n_tokens, np.uint16)
    split.read(0, tokens)
    text = load_tokenizer("gpt2").decode(tokens.tolist())
    assert text == "".join(f"<|endoftext|>{word}" for word in ("one", "two", "three", "four"))


def test_tokenized_shards_arrive_whole_though_the_way_breaks(prepare, tmp_path):
    files = {"README.md": b"shards"}
    counts = {"fineweb_val_000000.bin": 8_000, "fineweb_train_000001.bin": 5_000}
    for name, count in counts.items():
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        files[name] = header.tobytes() + np.full(count, 262, "<u2").tobytes()
    hub = Hub(files)
    hub.broken = {"fineweb_val_000000.bin"}
    out = tmp_path / "out"
    done = prepare(hub, "download", "fineweb-10b", "--out", out)
    assert done.returncode == 2
    assert "fineweb_val_000000.bin did not arrive" in done.stderr
    with pytest.raises(ValueError, match="not complete"):
        open_split(out, "train")
    # what has arrived is not asked for again
    hub = Hub(files)
    hub.files = files | {"fineweb_val_000000.bin": files["fineweb_val_000000.bin"][:-1] + b"\0"}
    done = prepare(hub, "download", "fineweb-10b", "--out", out)
    assert hub.fetched == ["fineweb_val_000000.bin"]
    assert done.returncode == 2
    assert "fineweb_val_000000.bin arrived damaged and was removed" in done.stderr
    done = prepare(Hub(files), "download", "fineweb-10b", "--out", out)
    assert done.returncode == 0, done.stderr
    for split, count in (("train", 5_000), ("val", 8_000)):
        opened = open_split(out, split)
        opened.verify()
        assert opened.n_tokens == count
