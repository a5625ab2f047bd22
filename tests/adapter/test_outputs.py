"""A folder gets its name when it is whole, and what is there is left as it is."""

import errno
import os
import signal
from multiprocessing import get_context

import pytest

from qwenlora.adapter.outputs import free_file, free_folder, staging


def make(out, do):
    """Make a folder, and do something to it while it comes about."""
    with staging(out, 10) as made:
        (made / "a").write_text("1")
        do(made)


def test_a_folder_is_there_after_the_block_and_not_before(tmp_path):
    out = free_folder(tmp_path / "deep" / "out")
    with staging(out, 10) as made:
        (made / "a").write_text("1")
        assert not out.exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (out / "a").read_text() == "1"


def test_a_folder_can_become_a_file(tmp_path):
    def pack(folder):
        packed = folder.with_name(f"{folder.name}.tar")
        packed.write_text("".join(file.read_text() for file in folder.iterdir()))
        return packed

    with staging(tmp_path / "out.tar", 10, pack) as made:
        (made / "a").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar"]
    assert (tmp_path / "out.tar").read_text() == "1"


def test_a_file_that_finds_no_room_takes_the_folder_with_it(tmp_path):
    def pack(folder):
        folder.with_name(f"{folder.name}.zip").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(ValueError, match="out.zip cannot be made: No space left"),
        staging(tmp_path / "out.zip", 1, pack),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_nothing_is_left_of_a_block_that_fails(tmp_path, error):
    def fail(made):
        raise error

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        make(tmp_path / "out", fail)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_under_nohup_a_closing_terminal_does_not_end_it(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        make(tmp_path / "out", lambda made: os.kill(os.getpid(), signal.SIGHUP))
        assert (tmp_path / "out" / "a").exists()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(SystemExit):
            make(tmp_path / "other", lambda made: os.kill(os.getpid(), signal.SIGHUP))
        assert not (tmp_path / "other").exists()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_place_that_cannot_be_is_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/out cannot be made: File exists; name another place"):
        staging(tmp_path / "file" / "out", 10).__enter__()
    with pytest.raises(ValueError, match="GB free, out needs 1000000000.0 GB; make room"):
        staging(tmp_path / "out", 10**18).__enter__()

    def come_first(made):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other's").touch()

    with pytest.raises(ValueError, match="out cannot be made: "):
        make(tmp_path / "out", come_first)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["other's"]


def die(made):
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_one_removes_what_a_killed_one_left(tmp_path):
    child = get_context("fork").Process(target=make, args=(tmp_path / "out", die))
    child.start()
    child.join()
    (left,) = tmp_path.iterdir()
    assert left.name == f"out.staging-{os.uname().nodename}-{child.pid}"
    (tmp_path / f"out.staging-another-{child.pid}").mkdir()
    (tmp_path / f"out.staging-{os.uname().nodename}-{os.getppid()}").mkdir()
    with staging(tmp_path / "out", 10) as made:
        (made / "b").write_text("2")
    assert not left.exists()
    assert len(list(tmp_path.iterdir())) == 3, "another machine's and a living one's stay"


def test_names_that_are_taken_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in ("file", "link"):
        with pytest.raises(ValueError, match=f"{taken} is there already"):
            free_folder(tmp_path / taken)
        with pytest.raises(ValueError, match=f"--output .*{taken} is there already"):
            free_file(tmp_path / taken, "--output")
    assert free_folder(tmp_path / "empty") == tmp_path / "empty"
    with pytest.raises(ValueError, match="empty/in lies within .*empty, which is read here"):
        free_folder(tmp_path / "empty" / "in", read=(None, tmp_path / "empty"))
    with pytest.raises(ValueError, match="there is no folder .*nowhere; make it first"):
        free_file(tmp_path / "nowhere" / "a", "--output")
