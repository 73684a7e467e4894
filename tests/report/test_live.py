"""The live page: it follows a run, answers only this machine, writes nothing, and ends cleanly."""

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from report.live import LivePage, LiveServer, watch
from tests.conftest import BROWSER_TIMEOUT

ROOT = Path(__file__).parent.parent.parent


def log(run, step, loss):
    """Append a step and a validation to a run."""
    run.mkdir(exist_ok=True)
    train = f'{{"split": "train", "step": {step}, "tokens": {step * 10}, "seconds": {step}, "loss": {loss}, '
    train += f'"lr": 0.1, "grad_norm": 1.0, "tokens_per_second": {1000 + step}}}\n'
    val = f'{{"split": "val", "step": {step}, "tokens": {step * 10}, "loss": {loss}, "bits_per_byte": 1.0}}\n'
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(train + val)
    with open(run / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"==== step {step}, sample 1\ntext of step {step}\n\n")


@pytest.fixture
def serve(monkeypatch):
    """`serve(*runs)`: a server for the page about these runs, which renders at every change."""
    monkeypatch.setattr("report.live.RENDER_SHARE", 1.0)
    servers = []

    def start(*runs):
        server = LiveServer(LivePage(runs), 0)
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def request(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content.decode()


def test_the_page_follows_two_runs(serve, tmp_path):
    runs = tmp_path / "a", tmp_path / "b"
    for run in runs:
        run.mkdir()
    server = serve(*runs)
    assert "no metrics.jsonl" in request(server)[1]
    for run in runs:
        log(run, 1, 9.0)
    first, page = request(server)
    assert "text of step 1" in page
    assert request(server, If_None_Match=first.headers["ETag"])[0].status == 304
    log(runs[1], 2, 4.25)
    second, page = request(server, If_None_Match=first.headers["ETag"])
    assert second.status == 200
    assert "4.2500" in page
    assert "text of step 2" in page
    assert len(request(server, "/plotly.js")[1]) > 1e6


def test_only_this_machine_is_answered_and_nothing_is_written(serve, tmp_path):
    log(tmp_path / "a", 1, 9.0)
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    server = serve(tmp_path / "a")
    assert server.server_address[0] == "127.0.0.1"
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert request(server, method=method)[0].status == 501
    for path in ("/metrics.jsonl", "/../../etc/passwd", "/%2e%2e/metrics.jsonl"):
        assert request(server, path)[0].status == 404
    assert request(server, Host="evil.example")[0].status == 403
    request(server)
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_the_command_ends_on_ctrl_c_and_names_what_is_missing(serve, tmp_path):
    with pytest.raises(FileNotFoundError, match="start the training first"):
        watch([tmp_path / "missing"], 0)
    log(tmp_path / "a", 1, 9.0)
    with pytest.raises(OSError, match="choose another one with --port"):
        watch([tmp_path / "a"], serve(tmp_path / "a").server_port)
    process = subprocess.Popen(
        [sys.executable, "-m", "report", tmp_path / "a", "--watch", "--port", "0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    address = type("Address", (), {"server_port": int(re.search(r"127.0.0.1:(\d+)", line)[1])})
    assert request(address)[0].status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "\n", "")


@pytest.mark.browser
def test_the_page_changes_in_the_browser_and_keeps_what_the_user_chose(browser, serve, tmp_path):
    for run in ("a", "b"):
        log(tmp_path / run, 1, 9.0)
    server = serve(tmp_path / "a", tmp_path / "b")
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(BROWSER_TIMEOUT)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    page.get_by_label("b", exact=True).uncheck()
    log(tmp_path / "a", 2, 4.25)
    page.locator("#samples summary", has_text="step 2").wait_for()
    assert "4.2500" in page.locator("#summary").inner_text()
    assert page.evaluate("document.getElementById('chart-0').calcdata[2].map(point => point.y)") == [9.0, 4.25]
    visible = page.evaluate("document.getElementById('chart-0').data.map(trace => trace.visible)")
    assert visible == [False, True, True, False, False, False]
    assert page.locator("#live").inner_text().startswith("This page follows the training. Last change at")
    server.shutdown()
    server.server_close()
    page.get_by_text("The server has ended").wait_for()
    context.close()
    assert errors == []
