"""`qwenlora report RUN --live` serves the run's page as it is now, to this machine's browsers, and nothing
else."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest
import requests

from qwenlora.adapter.publish.live import LiveReport
from qwenlora.cli import main as cli
from qwenlora.run.folder import RunFolder

COMMAND = (sys.executable, "-c", "from qwenlora.cli.main import main; main()", "report")


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """Return the folder of a run that has trained three steps."""
    folder = RunFolder(tmp_path / "my run")
    folder.path.mkdir()
    folder.config.write_text("model: {name_or_path: tiny}\ntrain: {max_steps: 100}\ndata: {train: a.jsonl}\n")
    folder.begin_attempt(1)
    for step in (1, 2, 3):
        log(folder, step, 4.0 - step)
    return folder


def log(run: RunFolder, step: int, loss: float) -> None:
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss, "time": 1_790_000_000.0 + step}) + "\n")


@pytest.fixture
def command(run):
    """The command, under way."""
    with subprocess.Popen([*COMMAND, str(run.path), "--live"], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_the_command_serves_the_page_as_the_run_goes_on_until_ctrl_c(run, command):
    url = re.search(r"http://127\.0\.0\.1:(\d+)/\S+", command.stdout.readline())
    assert url, "the first line has the address"
    first = requests.get(url[0], timeout=60)
    assert (first.status_code, int(first.headers["Refresh"]) > 0) == (200, True)
    log(run, 4, 0.4321)
    second = requests.get(url[0], timeout=60).text
    assert "0.4321" in second
    assert "0.4321" not in first.text
    listening = [one for one in psutil.Process(command.pid).net_connections() if one.status == "LISTEN"]
    assert [(one.laddr.ip, one.laddr.port) for one in listening] == [("127.0.0.1", int(url[1]))]
    command.send_signal(signal.SIGINT)
    assert command.wait(60) == 0
    assert not run.report.exists(), "nothing is written"


@pytest.fixture
def server(run):
    with LiveReport(run) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(server: LiveReport, path: str, host: str = "127.0.0.1:1") -> bytes:
    """Return the answer to a request that no library has tidied up."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(2**16), b""))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/config.yaml",
        "{page}config.yaml",
        "{page}../config.yaml",
        "{page}%2e%2e/config.yaml",
        "//etc/passwd",
    ],
)
def test_nothing_but_the_report_is_served(server, path):
    answer = asked(server, path.format(page=server.path))
    assert answer.startswith(b"HTTP/1.0 404 ")
    assert b"name_or_path" not in answer


def test_pages_of_other_sites_cannot_ask_under_their_own_name(server):
    assert asked(server, server.path, "rebound.example:80").startswith(b"HTTP/1.0 404 ")
    assert asked(server, server.path, "localhost:8888").startswith(b"HTTP/1.0 200 ")  # through ssh -L


def test_the_page_is_made_again_when_the_run_went_on_or_some_time_has_passed(server, run, monkeypatch):
    first = server.page()
    assert server.page() is first
    log(run, 4, 0.5)
    assert (second := server.page()) is not first
    monkeypatch.setattr(server, "_made_at", server._made_at - 60)
    assert server.page() is not second, "it may have been killed, and then it writes nothing"


def test_a_run_that_is_gone_is_an_error_until_it_is_back(server, run):
    run.config.rename(run.path / "away")
    assert asked(server, server.path).startswith(b"HTTP/1.0 503 ")
    (run.path / "away").rename(run.config)
    assert asked(server, server.path).startswith(b"HTTP/1.0 200 ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "8000"], "--port 8000 has no effect without --live; add it, or leave --port out"),
        (
            ["--live", "--html", "x.html"],
            "--html x.html has no effect with --live, which writes nothing; leave one out",
        ),
    ],
)
def test_options_without_effect_are_refused(run, options, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.app(["report", str(run.path), *options])
    assert (left.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")


def test_a_port_in_use_and_a_folder_without_a_run_are_refused(server, run, tmp_path):
    with pytest.raises(
        ValueError, match=rf"^--port {server.server_port} cannot be used: Address already in use;"
    ):
        LiveReport(run, server.server_port)
    with pytest.raises(ValueError, match="holds no run"):
        LiveReport(RunFolder(tmp_path / "none"))
