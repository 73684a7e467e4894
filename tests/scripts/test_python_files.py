"""Test the corpus of Python source."""

import json

SHORT, LONG = "x = 1\n", "# a comment\n" * 100


def test_the_corpus_has_each_file_once_with_its_path(python, tmp_path):
    packages = tmp_path / "packages"
    files = {"a/one.py": LONG, "a/copy.py": LONG, "a/short.py": SHORT, "plotly/generated.py": LONG + "1"}
    files |= {"b/two.py": LONG + "2", "b/notes.txt": LONG + "3", "large.py": "x" * 300_000}
    for name, text in files.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text, encoding="utf-8")
    (packages / "latin.py").write_bytes(b"# caf\xe9\n" * 100)
    corpus = tmp_path / "made" / "python.jsonl"
    python("-m", "scripts.python_files", corpus, "--packages", packages)
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    found = dict(text.split("\n", 1) for text in texts)
    assert set(found) - {"# a/one.py", "# a/copy.py"} == {"# b/two.py"}
    assert sorted(found.values()) == [LONG, LONG + "2"]


def test_a_missing_directory_is_named(python, tmp_path):
    result = python("-m", "scripts.python_files", tmp_path / "x.jsonl", "--packages", tmp_path / "no", check=False)
    assert result.returncode == 2
    assert f"--packages {tmp_path / 'no'}: there is no such directory" in result.stderr
    assert not (tmp_path / "x.jsonl").exists()
