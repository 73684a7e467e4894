"""Serve a page about training runs. The page is updated while the runs train.

The server answers only requests from this machine, and writes no files.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from plotly.offline import get_plotlyjs

from files import PARTIAL_SUFFIX
from report.charts import make_charts
from report.page import render_page
from report.runs_page import page_values, read_logs
from training.run_directory import RunDirectory

HOST = "127.0.0.1"
# Names that a request may have in its Host header. This prevents DNS rebinding: another site could let its domain name
# resolve to 127.0.0.1, and its pages could then read the answers of this server.
HOST_NAMES = (HOST, "localhost")
RENDER_SHARE = 0.1  # rendering the page may take at most this fraction of the time
REQUEST_SECONDS = 30  # a client that sends nothing for this time is disconnected


class LivePage:
    """The page about the runs. It is rendered again when a file or the status of a run has changed."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = directories
        self._lock = threading.Lock()
        self._made_from: object = None
        self._not_before = 0.0
        self._page = b""

    def get(self) -> bytes:
        """Render the page again if a run has changed and RENDER_SHARE allows it, and return the page."""
        with self._lock:
            state = [run_state(run) for run in self.directories]
            began = time.monotonic()
            if state != self._made_from and began >= self._not_before:
                self._page = self._make()
                self._made_from = state
                seconds = time.monotonic() - began
                self._not_before = began + seconds / RENDER_SHARE
            return self._page

    def _make(self) -> bytes:
        try:
            logs = read_logs(self.directories)
            charts = make_charts(logs)
            page = render_page("runs.html", page="", links=(), live=True, plotly="", **page_values(logs, charts))
        except (OSError, ValueError) as error:  # for example before the first step, when a run has no metrics
            title = ", ".join(run.resolve().name for run in self.directories)
            page = render_page("waiting.html", page="", links=(), title=title, data=None, message=str(error))
        return page.encode()


def run_state(directory: Path) -> object:
    """Return the modification times and sizes of the files in a run's directory, and the run's status.

    The page is rendered again when one of these values has changed. The status is included because no file changes
    when a run is killed.
    """
    files = sorted(path for path in directory.glob("*.*") if path.suffix != PARTIAL_SUFFIX)
    stats = [(path, stat.st_mtime_ns, stat.st_size) for path in files if (stat := _stat(path))]
    try:
        return stats, RunDirectory(directory).read_status()
    except (OSError, ValueError):  # `LivePage._make` shows this error on the page
        return stats, ""


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # the file was removed after it was listed
        return None


class LiveServer(ThreadingHTTPServer):
    """Serves the page at `/` and, at `/plotly.js`, the library that draws the charts of the page."""

    daemon_threads = True

    def __init__(self, page: LivePage, port: int) -> None:
        self.page, self.plotly = page, get_plotlyjs().encode()
        super().__init__((HOST, port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnected or timed out; print other errors."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests. To a request with another method, http.server itself replies with status 501."""

    server: LiveServer
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        """Send the page, plotly.js, or an error."""
        path = self.path.partition("?")[0]
        if self.headers.get("Host", "").partition(":")[0] not in HOST_NAMES:
            self.send_error(403, "This server answers only requests to 127.0.0.1 or localhost")
        elif path == "/":
            self._send(self.server.page.get(), "text/html; charset=utf-8")
        elif path == "/plotly.js":
            self._send(self.server.plotly, "text/javascript; charset=utf-8")
        else:
            self.send_error(404, "This server has only the page /")

    def _send(self, body: bytes, kind: str) -> None:
        """Send `body` with the media type `kind`, or only status 304 if the client already has the same body."""
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        changed = self.headers.get("If-None-Match") != etag
        self.send_response(200 if changed else 304)
        self.send_header("ETag", etag)
        self.send_header("Cache-Control", "no-cache")
        if changed:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if changed:
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing, because an open page sends a request every two seconds."""


def watch(directories: Sequence[Path], port: int) -> None:
    """Serve the page about the runs until Ctrl-C.

    Raises:
        FileNotFoundError: a directory does not exist.
        OSError: the port cannot be used, for example because another program uses it.
    """
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(f"there is no directory {directory}: start the training first, or check the name")
    try:
        server = LiveServer(LivePage(directories), port)
    except OSError as error:
        raise OSError(f"port {port} cannot be used ({error.strerror}): choose another one with --port") from error
    with server:
        print(
            f"http://{HOST}:{server.server_port} follows {', '.join(map(str, directories))}. Ctrl-C ends the server.",
            flush=True,
        )
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()
