"""What an agent's forkserver starts, and what the agent learns of its end. The processes are real; instead of
trainer/main.py they run a few lines."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qwenlora.launch import forkserver
from qwenlora.launch.children import Children
from qwenlora.launch.forkserver import Forkserver
from qwenlora.run.folder import RunFolder
from qwenlora.run.rank_deaths import first_killed

# if a test wants it: as if a library had used CUDA while it was imported
USED_CUDA = (
    "torch = types.ModuleType('torch'); torch.cuda = types.SimpleNamespace(_is_in_bad_fork=lambda: True);"
)
USED_CUDA += "sys.modules['torch'] = torch"

FAILS_LATER = """
import pathlib
while not pathlib.Path(arguments[0] + ".go").exists():
    time.sleep(0.01)
os._exit(3)
"""
MISSING = "ModuleNotFoundError: No module named 'a_library_that_is_not_here'"
# in the place of qwenlora.trainer.forkserver: without the libraries, and with work that a test chooses
SERVER = """
import os, sys, time, types
from qwenlora.trainer import forkserver
forkserver.MODULES = ("json", "a_library_that_is_not_here")
exec(os.environ.get("BEFORE", ""))
arguments = forkserver.serve()
exec(os.environ["WORK"])
"""


@pytest.fixture
def server(tmp_path, monkeypatch, request):
    monkeypatch.setenv("BEFORE", getattr(request, "param", ""))
    folder = RunFolder(str(tmp_path / "run"))
    folder.logs(1).mkdir(parents=True)
    real = subprocess.Popen
    monkeypatch.setattr(
        forkserver.subprocess,
        "Popen",
        lambda argv, **options: real([sys.executable, "-c", SERVER, argv[-1]], **options),
    )
    server = Forkserver(folder, 2)
    yield server
    server.close()


def ended(forked):
    end = time.monotonic() + 60
    while (code := forked.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    return code


def lines(server):
    """Return the launch log without empty lines and the failed import of the module that is not there."""
    text = server._folder.log(1, "launch").read_text()
    text = text[text.rindex(MISSING) + len(MISSING) :] if MISSING in text else text
    return [line for line in text.splitlines() if line]


def ranks(*work):
    return [{"RANK": str(number), "WORK": lines} for number, lines in enumerate(work)]


def test_a_rank_has_its_variables_name_arguments_and_log_and_no_other_files(server, capfd):
    look = """
import pathlib
print(pathlib.Path("/proc/self/comm").read_text().strip(), os.environ["RANK"], arguments, file=sys.stderr)
print(sorted(int(n) for n in os.listdir("/proc/self/fd"))[:4], sys.stdin.read() == "", file=sys.stderr)
"""
    assert ended(server.train(1, "launch", ranks(look))) == 0
    config = str(server._folder.config)
    assert lines(server) == [f"rank-0 0 [{config!r}]", "[0, 1, 2, 3] True"]


def test_the_preparation_is_named_and_comes_before_the_ranks(server):
    assert ended(server.prepare(1, {"WORK": "print(arguments[1], file=sys.stderr); sys.exit(2)"})) == 2
    assert ended(server.train(1, "launch", ranks("print('rank', file=sys.stderr)"))) == 0
    assert lines(server) == ["--prepare-only", "rank"]


def test_a_failure_is_known_while_the_others_still_run(server):
    forked = server.train(1, "launch", ranks("time.sleep(600)", "os._exit(1)"))
    end = time.monotonic() + 60
    while not forked.reports_failure():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert not forked.reports_failure(), "once"
    assert forked.poll() is None
    (rank,) = forked.ranks()
    assert rank.name() == "rank-0"
    forked.kill()
    assert ended(forked) == 1
    assert not forkserver._runs(rank), "a run folder is free only when nobody can write to it"
    assert first_killed(server._folder.log(1, "launch").read_text()) is None, "its own agent killed rank 0"


def test_the_ranks_of_the_next_attempt_come_from_the_same_server_though_the_last_were_killed(server):
    server._folder.logs(2).mkdir()
    forked = server.train(1, "launch", ranks("os.kill(os.getpid(), 19)", "import time; time.sleep(600)"))
    end = time.monotonic() + 60
    while len(forked.ranks()) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    pid = server.process.pid
    forked.kill()
    ended(forked)
    assert ended(server.train(2, "launch", ranks("print('again', file=sys.stderr)"))) == 0
    assert server.process.pid == pid
    assert server._folder.log(2, "launch").read_text() == "again\n"
    first = server._folder.log(1, "launch").read_text()
    assert MISSING in first, "each attempt keeps its own log"
    assert first_killed(first) is None, "its own agent killed the ranks"


def test_a_server_that_was_killed_is_started_again_for_the_next_attempt(server):
    forked = server.train(1, "launch", ranks("time.sleep(600)"))
    server.process.kill()
    assert ended(forked) == -signal.SIGKILL
    assert ended(server.train(1, "launch", ranks("pass"))) == 0


def test_ranks_are_killed_also_while_the_server_still_imports(server):
    os.kill(server.process.pid, signal.SIGSTOP)
    forked = server.train(1, "launch", ranks("time.sleep(600)"))
    forked.kill()
    assert ended(forked) == -signal.SIGKILL
    assert ended(server.train(1, "launch", ranks("pass"))) == 0


def test_a_killed_rank_is_in_the_log_and_the_first_failure_is_the_exit_code(server):
    wait = (
        "import pathlib\nwhile not pathlib.Path(sys.argv[1] + '.go').exists(): time.sleep(0.01)\nos._exit(3)"
    )
    forked = server.train(1, "launch", ranks("os.kill(os.getpid(), 9)", wait))
    end = time.monotonic() + 60
    while not forked.reports_failure():
        assert time.monotonic() < end
        time.sleep(0.02)
    (server._folder.path / "config.yaml.go").touch()
    assert ended(forked) == -signal.SIGKILL
    assert lines(server) == ["rank-0 was killed by signal 9"]


def test_ranks_that_leave_to_be_requeued_have_not_failed(server):
    forked = server.train(1, "launch", ranks("os._exit(75)", "os._exit(75)"))
    assert ended(forked) == 75
    assert not forked.reports_failure()


def test_what_it_wrote_is_in_the_log_if_it_dies_before_it_starts_anything(server):
    os.pwrite(server._early_log.fileno(), b"Illegal instruction\n", 0)
    server.process.kill()
    server.process.wait()
    forked = server.train(1, "launch", ranks("pass"))
    assert ended(forked) == -signal.SIGKILL
    assert lines(server) == ["Illegal instruction", "forkserver was killed by signal 9"]


def test_a_stop_request_reaches_ranks_but_ends_a_preparation(server):
    handle = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(75))\ntime.sleep(600)"
    for start, expected in (
        (lambda: server.train(1, "launch", ranks(handle, handle)), 75),
        (lambda: server.prepare(1, {"WORK": "time.sleep(600)"}), -signal.SIGKILL),
    ):
        children = Children()
        children.stop_requested, children.stop_signal = True, "SIGTERM"
        forked = start()
        end = time.monotonic() + 60
        while expected == 75 and len(forked.ranks()) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert children.run(forked, lambda: None) == expected


def test_ranks_share_the_cores_as_under_torchrun(server):
    show = "print(os.environ['OMP_NUM_THREADS'], file=sys.stderr)"
    assert ended(server.train(1, "launch", ranks(show))) == 0
    assert lines(server) == [os.environ.get("OMP_NUM_THREADS", "1")]


WRITTEN = (
    "open(sys.argv[1], 'w').write('{{run_dir: ., model: {{name_or_path: {}}}, data: {{train: example}}}}')"
)


@pytest.mark.parametrize("server", [WRITTEN.format(base) for base in ("tiny", "./no")], indirect=True)
def test_nothing_is_imported_for_a_base_that_is_not_there(server):
    assert ended(server.prepare(1, {"WORK": "os._exit(2)"})) == 2
    config, log = server._folder.config.read_text(), server._folder.log(1, "launch").read_text()
    assert (MISSING in log) is ("tiny" in config)


@pytest.mark.parametrize("server", ["import warnings; warnings.warn('an old driver')"], indirect=True)
def test_what_is_written_at_import_is_in_the_log_before_what_ranks_write(server):
    assert ended(server.train(1, "launch", ranks("print('rank', file=sys.stderr)"))) == 0
    text = server._folder.log(1, "launch").read_text()
    assert text.index("an old driver") < text.index(MISSING) < text.index("rank")


@pytest.mark.parametrize("server", ["os.posix_spawn('/bin/true', ['true'], {})"], indirect=True)
def test_a_child_that_a_library_left_behind_is_nobody_s_failure(server):
    assert ended(server.train(1, "launch", ranks("pass"))) == 0


def test_a_failure_after_a_rank_has_left_to_be_requeued_counts(server):
    forked = server.train(1, "launch", ranks("os._exit(75)", FAILS_LATER))
    end = time.monotonic() + 60
    while len(forked.ranks()) != 1:
        assert time.monotonic() < end
        time.sleep(0.02)
    (server._folder.path / "config.yaml.go").touch()
    assert ended(forked) == 3
    assert forked.reports_failure()


@pytest.mark.parametrize("server", [USED_CUDA], indirect=True)
def test_where_an_import_has_used_cuda_ranks_begin_as_new_interpreters(server):
    assert ended(server.train(1, "launch", ranks("print('forked', file=sys.stderr)"))) == 2
    assert lines(server)[0].startswith(f"error: no config file {server._folder.config} ")


def test_a_killed_process_that_nobody_collects_has_ended():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not forkserver._runs(psutil.Process(process.pid))
    process.wait()
