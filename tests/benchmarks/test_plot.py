"""The plot of bench.py attention."""

import json

import pytest
from matplotlib import image

from benchmarks.plot import main


def write_results(path, title):
    result = {"seconds": 1.0, "peak_memory": 2.0**28}
    tables = [
        {"title": title, "tokens": n, "results": dict.fromkeys(("full", "window", "lsh"), result)} for n in (1, 8)
    ]
    path.write_text(json.dumps({"tables": tables}))
    return str(path)


def test_results_are_drawn(tmp_path):
    main([write_results(tmp_path / "bench.json", "attention"), str(tmp_path / "a.png")])
    height, width, _ = image.imread(tmp_path / "a.png").shape
    assert (width, height) == (900, 400)


@pytest.mark.parametrize("content", [None, "[]", "{}"])
def test_results_of_another_benchmark_are_refused(tmp_path, capsys, content):
    path = write_results(tmp_path / "bench.json", "loader")
    if content is not None:
        (tmp_path / "bench.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main([path, str(tmp_path / "a.png")])
    assert stopped.value.code == 2
    assert "has no results of bench.py attention" in capsys.readouterr().err
