"""Tables: what they mean, and what is refused with its file and row."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tables import parse_csv, read_json_lines, read_table


def test_csv_and_json_lines_give_the_same_rows(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"A, ""b""\r\nc",pos\r\n\r\nd,\r\n')
    (tmp_path / "A.JSONL").write_bytes(
        b'\xef\xbb\xbf{"text": "A, \\"b\\"\\r\\nc", "label": "pos"}\r\n \n{"text": "d", "label": ""}\n\n'
    )
    (tmp_path / "b.csv").write_bytes((tmp_path / "a.csv").read_bytes().decode().encode("utf-16-le"))
    expected = [{"text": 'A, "b"\r\nc', "label": "pos"}, {"text": "d", "label": ""}]
    for name in ("a.csv", "A.JSONL", "b.csv"):
        assert read_table(tmp_path / name) == expected
    assert [number for number, _ in read_json_lines(tmp_path / "A.JSONL")] == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nA calm, pleasant trip,pos\n", "a.csv, row 1 has 3 fields, the header has 2: quote the"),
        ("a.csv", b"text,label\nok,pos\n\nLate\n", "a.csv, row 2 has 1 field, the header has 2"),
        ("a.csv", b"a,a\n1,2\n", "a.csv has two columns named 'a'"),
        ("a.csv", b'text\n"open\n', "a.csv, row 1 cannot be read"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv, line 2: byte 0xE9 is not UTF-8"),
        ("a.csv", b"text\n", "a.csv is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl is empty"),
        ("a.jsonl", b"{}\n[1]\n", "a.jsonl, line 2: found a list, expected a JSON object"),
        ("a.jsonl", b"{}\n{\n", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl, line 1: the JSON is nested too deeply"),
        ("a.jsonl", b"PK\x03\x04", "a.jsonl is not a text file: it is a zip archive"),
        ("a.xlsx", b"", "a.xlsx has an unknown type: expected .csv or .jsonl"),
    ],
)
def test_unusable_tables_name_file_and_row(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_every_table_that_the_csv_module_writes_is_read_back(rows):
    sink = io.StringIO(newline="")
    csv.writer(sink).writerows([("text", "label"), *rows])
    assert list(parse_csv(io.StringIO(sink.getvalue(), newline=""), "a.csv")) == [["text", "label"], *map(list, rows)]


@given(st.lists(st.dictionaries(texts, st.none() | texts | st.integers(), max_size=3), min_size=1, max_size=5))
def test_every_json_line_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_table(path) == rows
