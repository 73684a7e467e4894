"""The plot of bench.py attention."""

import json

import pytest
from matplotlib import image

from benchmarks.plot import draw, main


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


def test_each_axis_has_numbers_where_it_has_no_power_of_ten():
    results = [{"seconds": 0.2 * n, "peak_memory": 2.0**28 * n} for n in (1, 3)]
    tables = [
        {"tokens": 1024 * n, "results": dict.fromkeys(("full", "window", "lsh"), result)}
        for n, result in enumerate(results, start=1)
    ]
    figure = draw(tables)
    figure.draw_without_rendering()
    low, high = ([label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes)
    assert {"0.2", "0.5"} <= set(low)
    assert "500" in high


@pytest.mark.parametrize("content", [None, "[]", "{}"])
def test_results_of_another_benchmark_are_refused(tmp_path, capsys, content):
    path = write_results(tmp_path / "bench.json", "loader")
    if content is not None:
        (tmp_path / "bench.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main([path, str(tmp_path / "a.png")])
    assert stopped.value.code == 2
    assert "has no results of bench.py attention" in capsys.readouterr().err
