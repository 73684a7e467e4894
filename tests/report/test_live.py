"""The live page: it follows a run, answers only this machine, writes nothing, and ends cleanly."""

import fcntl
import http.client
import re
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from report.live import LivePage, LiveServer, watch
from tests.conftest import BROWSER_TIMEOUT
from training.run_directory import RunDirectory


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


def test_the_page_shows_that_a_run_was_killed(serve, tmp_path):
    """Its process has changed no file: the lock of its directory is free."""
    run = RunDirectory(tmp_path / "a")
    log(run.path, 1, 9.0)
    (run.path / "status.json").write_text('{"status": "running"}')
    server = serve(run.path)
    with open(run.path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "<td>running</td>" in request(server)[1]
    assert "<td>killed</td>" in request(server)[1]


def test_the_library_of_the_charts_is_sent_once(serve, tmp_path):
    log(tmp_path / "a", 1, 9.0)
    server = serve(tmp_path / "a")
    first, library = request(server, "/plotly.js")
    assert len(library) > 1e6
    again, nothing = request(server, "/plotly.js", If_None_Match=first.headers["ETag"])
    assert (again.status, nothing) == (304, "")


def test_the_command_ends_on_ctrl_c_and_names_what_is_missing(serve, tmp_path, launch):
    with pytest.raises(FileNotFoundError, match="start the training first"):
        watch([tmp_path / "missing"], 0)
    log(tmp_path / "a", 1, 9.0)
    with pytest.raises(OSError, match="choose another one with --port"):
        watch([tmp_path / "a"], serve(tmp_path / "a").server_port)
    process = launch(sys.executable, "-m", "report", tmp_path / "a", "--watch", "--port", "0")
    line = process.stdout.readline()
    address = SimpleNamespace(server_port=int(re.search(r"127.0.0.1:(\d+)", line)[1]))
    assert request(address)[0].status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert process.stdout.read() == "\n"


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
    page.locator("#samples summary", has_text="step 1").last.click()
    log(tmp_path / "a", 2, 4.25)
    page.locator("#samples summary", has_text="step 2").wait_for()
    assert "4.2500" in page.locator("#summary").inner_text()
    assert page.evaluate("document.getElementById('chart-0').calcdata[2].map(point => point.y)") == [9.0, 4.25]
    visible = page.evaluate("document.getElementById('chart-0').data.map(trace => trace.visible)")
    assert visible == [False, True, True, False, False, False]
    opened = page.locator("#samples details").evaluate_all("all => all.map(one => [one.dataset.name, one.open])")
    assert opened == [["a, step 1", False], ["a, step 2", False], ["b, step 1", True]]
    assert page.locator("#live").inner_text().startswith("This page follows the training. Last change at")
    server.shutdown()
    server.server_close()
    page.get_by_text("The server has ended").wait_for()
    context.close()
    assert errors == []
