"""Which signals ask a run to stop, and output that nobody can read any more."""

import io
import os
import signal
import sys
from pathlib import Path

import pytest

from qwenlora.launch.children import Children
from qwenlora.run.lossy_output import escape_what_the_terminal_lacks, lossy
from qwenlora.run.signals import STOP_SIGNALS, to_handle, under_nohup
from qwenlora.trainer.ranks.stop_request import StopRequest


@pytest.fixture(autouse=True)
def handlers():
    kept = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_agent_and_a_rank_take_each_as_a_request(number):
    with Children() as children:
        os.kill(os.getpid(), number)
    assert (children.stop_requested, children.stop_signal) == (True, number.name)
    request = StopRequest()
    request.listen()
    os.kill(os.getpid(), number)
    assert (request.asked, request.why) == (True, number.name)


def test_under_nohup_a_closing_terminal_is_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert under_nohup()
    with Children() as children:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not children.stop_requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert children.stop_requested
    assert under_nohup(), "as before"
    request = StopRequest()
    request.listen(nohup=True)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not request.asked


def test_a_rank_under_a_launcher_that_ignores_signals_hears_them():
    for number in STOP_SIGNALS:  # as launch/children.py has the launcher begin
        signal.signal(number, signal.SIG_IGN)
    request = StopRequest()
    request.listen(nohup=False)
    os.kill(os.getpid(), signal.SIGHUP)
    assert request.asked


def test_only_sighup_depends_on_nohup():
    assert set(to_handle(nohup=False)) - set(to_handle(nohup=True)) == {signal.SIGHUP}


def closed_terminal() -> int:
    master, slave = os.openpty()
    os.close(master)
    return slave


def pipe_without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("gone", [closed_terminal, pipe_without_reader])
def test_output_that_nobody_reads_is_lost_without_an_error(gone):
    with pytest.raises(OSError, match="Input/output error|Broken pipe"):
        os.write(gone(), b"x")
    stream = os.fdopen(gone(), "w", encoding="utf-8")
    screen = lossy(stream)
    for _ in range(3):
        assert screen.write("text\n" * 5000) == 25000
        screen.flush()
    stream.close()  # as Python does at its end


def test_a_full_disk_loses_only_what_is_written_meanwhile():
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        screen = lossy(full)
        screen.write("lost\n")
        screen.flush()
        assert Path(f"/proc/self/fd/{full.fileno()}").readlink() == Path("/dev/full"), (
            "it may have room again"
        )
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


@pytest.mark.parametrize(
    ("encoding", "written"), [("gbk", "你好 \\U0001f600"), ("ascii", "\\u4f60\\u597d \\U0001f600")]
)
def test_a_terminal_of_another_encoding_shows_the_rest_and_escapes(monkeypatch, encoding, written):
    screens = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", screens[0])
    monkeypatch.setattr(sys, "stderr", screens[1])
    escape_what_the_terminal_lacks()
    for screen in screens:
        screen.write("你好 😀")
        screen.flush()
        assert screen.buffer.getvalue().decode(encoding) == written


def test_what_can_be_written_is_written():
    stream = io.StringIO()
    print("hello", file=lossy(stream), flush=True)
    assert stream.getvalue() == "hello\n"
