"""A run's report while it trains: `qwenlora report runs/tiny --live`, for browsers of this machine alone."""

import secrets
import socket
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from qwenlora.adapter.publish import curves
from qwenlora.adapter.publish.report import render
from qwenlora.adapter.publish.run_summary import summarise_run
from qwenlora.run.folder import RunFolder

HOST = "127.0.0.1"
_OURS = (HOST, "localhost")  # names that a browser may have come by; others are other sites' tricks
_REFRESH_S = 5  # while it trains
_REST_S = 30  # otherwise; a page that is older is made anew: a killed run writes nothing


class LiveReport(HTTPServer):
    """Serves one page, made anew when the run's files have changed. Its address holds a random word: other
    users of the machine cannot guess it. port: 0 for any free one. Raises: ValueError."""

    def __init__(self, run: RunFolder, port: int = 0) -> None:
        self.run = run
        self.path = f"/{secrets.token_urlsafe(12)}/"
        self._made_of: list[object] = []
        self._page, self._made_at, self.refresh_s = b"", 0.0, _REST_S
        self.page()  # before anything listens: a folder without a run is refused
        try:
            super().__init__((HOST, port), _Request)
        except OSError as error:
            raise ValueError(f"--port {port} cannot be used: {error.strerror}; leave it out") from None
        self.url = f"http://{HOST}:{self.server_port}{self.path}"

    def page(self) -> bytes:
        """Return the page as it is now. Raises: ValueError when there is no run any more."""
        run = self.run
        files = (run.config, run.metrics, run.history.file, run.history.progress.path, run.comparison)
        seen: list[object] = [file.stat().st_mtime_ns if file.exists() else None for file in files]
        if seen != self._made_of or time.monotonic() > self._made_at + _REST_S:
            summary = summarise_run(run)
            page = render(summary, curves.draw_charts(summary.curves, summary.attempts))
            self._page, self._made_of, self._made_at = page.encode(), seen, time.monotonic()
            self.refresh_s = _REFRESH_S if summary.state == "running" else _REST_S
        return self._page

    def said(self) -> str:
        """Return what to tell the user."""
        port = self.server_port
        return (
            f"the report of {self.run.path.name}, as it trains: {self.url}\nCtrl-C ends it; from another"
            f" machine: ssh -L {port}:{HOST}:{port} {socket.gethostname()}, and the same address there"
        )


class _Request(BaseHTTPRequestHandler):
    server: LiveReport
    timeout = 5  # a browser that asks nothing must not keep others waiting

    def do_GET(self) -> None:
        """Answer with the report, or with an error: there is nothing else."""
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if self.path != self.server.path or host not in _OURS:
            self.send_error(404)
            return
        try:
            page = self.server.page()
        except (OSError, ValueError):
            self.send_error(503, "the run cannot be read")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Refresh", str(self.server.refresh_s))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the user's terminal is not a server's log."""
