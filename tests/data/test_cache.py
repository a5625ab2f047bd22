"""A folder is built once, whole or not at all, whoever else is at it and however they end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from qwenlora.data import cache
from qwenlora.data.cache import Index, build_once, digest_of, read_index

BUILDER = """
import sys, time
from pathlib import Path
from qwenlora.data.cache import Index, build_once
class Built(Index):
    by: str
def build(folder):
    (folder / "half").write_text("x")
    print("building", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.02)
    (folder / "whole").write_text(sys.argv[3])
    return Built(by=sys.argv[3])
print(build_once(Path(sys.argv[1]), Built, build, lambda line: print(line, flush=True)).by, flush=True)
"""


class Built(Index):
    """by: who built the folder."""

    by: str = ""


def builder(folder, until, name: str) -> subprocess.Popen:
    """Start a process that builds a folder, and ends when the file `until` is there."""
    command = [sys.executable, "-c", BUILDER, str(folder), str(until), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def others(folder) -> list[str]:
    """Return what lies beside the folder."""
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


def test_what_is_there_is_not_built_again(tmp_path):
    build_once(tmp_path / "a", Built, lambda folder: Built(by="first"))
    assert build_once(tmp_path / "a", Built, lambda folder: pytest.fail("built again")).by == "first"


def test_two_that_start_together_build_once(tmp_path):
    folder = tmp_path / "a"
    first = builder(folder, tmp_path / "go", "first")
    assert first.stdout.readline() == "building\n"
    second = builder(folder, tmp_path, "second")
    place = f"process {first.pid} on {os.uname().nodename}"
    assert second.stdout.readline() == f"waiting for {place}, which prepares the same data\n"
    (tmp_path / "go").touch()
    assert second.communicate(timeout=500)[0] == "first\n"
    assert first.communicate(timeout=500)[0] == "first\n"
    assert others(folder) == ["go"]


def test_a_killed_builder_leaves_nothing_and_the_one_that_waits_takes_over(tmp_path):
    folder = tmp_path / "a"
    first = builder(folder, tmp_path / "never", "first")
    assert first.stdout.readline() == "building\n"
    second = builder(folder, tmp_path, "second")
    assert "waiting for" in second.stdout.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    said = second.communicate(timeout=500)[0]
    assert said.endswith("has ended without finishing: preparing the data here\nbuilding\nsecond\n")
    assert (folder / "whole").read_text() == "second"
    assert others(folder) == [], "what the killed one left is swept away"


def test_what_killed_builders_of_other_data_left_is_swept_away_too(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = os.uname().nodename
    for name, pid in (("dead", ended.pid), ("alive", os.getpid())):
        (tmp_path / f"{name}.staging-{host}-{pid}-0").mkdir()
        (tmp_path / f"{name}.claim").write_text(json.dumps({"host": host, "pid": pid, "token": "x"}))
    (tmp_path / "far.claim").write_text(json.dumps({"host": "elsewhere", "pid": ended.pid, "token": "x"}))
    build_once(tmp_path / "a", Built, lambda folder: Built())
    assert others(tmp_path / "a") == ["alive.claim", f"alive.staging-{host}-{os.getpid()}-0", "far.claim"]


def test_a_builder_on_another_machine_that_falls_silent_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SILENT_S", 0.5)
    claim = tmp_path / "a.claim"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "x"}))
    heard = []
    assert build_once(tmp_path / "a", Built, lambda folder: Built(by="us"), heard.append).by == "us"
    assert heard[0] == "waiting for process 1 on elsewhere, which prepares the same data"
    assert not claim.exists()


def test_a_builder_that_lives_is_waited_for_however_long_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SILENT_S", 2)
    monkeypatch.setattr(cache, "BEAT_S", 0.1)
    built = []

    def slow(folder):
        built.append(folder)
        time.sleep(4)
        return Built()

    threads = [threading.Thread(target=build_once, args=(tmp_path / "a", Built, slow)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_without_any_claims_the_first_whole_folder_wins(tmp_path, monkeypatch):
    """As on a file system where neither sees the other's claim: both build, both end right."""
    folder = tmp_path / "a"

    def build(staging):
        if not folder.exists():
            (tmp_path / "a.claim").unlink()
            build_once(folder, Built, lambda inner: Built(by="the faster one"))
        return Built(by="the slower one")

    assert build_once(folder, Built, build).by == "the faster one"
    assert others(folder) == []


def test_a_builder_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise ValueError("bad rows")

    with pytest.raises(ValueError, match="bad rows"):
        build_once(tmp_path / "a", Built, fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["lost", "short", "other bytes", "no index", "half an index"])
def test_a_damaged_folder_is_built_again(tmp_path, damage):
    def build(folder):
        (folder / "train").mkdir()
        (folder / "train" / "ids.bin").write_bytes(b"12345678")
        return Built()

    folder = tmp_path / "a"
    build_once(folder, Built, build)
    assert read_index(folder, Built).files["train/ids.bin"][0] == 8
    if damage == "lost":
        (folder / "train" / "ids.bin").unlink()
    elif damage == "short":
        (folder / "train" / "ids.bin").write_bytes(b"1234")
    elif damage == "other bytes":
        (folder / "train" / "ids.bin").write_bytes(b"87654321")
        os.utime(folder / "train" / "ids.bin", (0, 0))  # whenever that was
    elif damage == "no index":
        (folder / "index.json").unlink()
    else:
        (folder / "index.json").write_text((folder / "index.json").read_text()[:5])
    assert read_index(folder, Built) is None
    build_once(folder, Built, build)
    assert (folder / "train" / "ids.bin").read_bytes() == b"12345678"
    assert others(folder) == []


def test_all_is_on_the_disk_before_it_is_renamed_and_the_name_after(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(cache, "sync", lambda path: synced.append((path.name, (tmp_path / "a").exists())))

    def build(folder):
        (folder / "one").write_text("x")
        (folder / "deep").mkdir()
        (folder / "deep" / "two").write_text("x")
        return Built()

    build_once(tmp_path / "a", Built, build)
    assert sorted(synced[:-1]) == [("one", False), ("two", False)]
    assert synced[-1] == (tmp_path.name, True)


def test_a_claim_that_another_took_over_is_left_to_it(tmp_path):
    def build(folder):
        (tmp_path / "a.claim").write_text("another's")
        return Built()

    build_once(tmp_path / "a", Built, build)
    assert (tmp_path / "a.claim").read_text() == "another's"


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(tmp_path, monkeypatch):
    file = tmp_path / "rows"
    file.write_text("one")
    old(file)
    hashed = cache.hashlib.file_digest

    def meanwhile(*arguments):
        file.write_text("two!")
        return hashed(*arguments)

    monkeypatch.setattr(cache.hashlib, "file_digest", meanwhile)
    digest_of(file, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def old(path) -> None:
    """Wait until a file counts as settled."""
    while time.time_ns() - path.stat().st_ctime_ns < 2.1e9:
        time.sleep(0.1)


def test_a_files_digest_is_remembered_and_a_change_is_seen_even_with_its_date_set_back(tmp_path, monkeypatch):
    file = tmp_path / "rows"
    file.write_text("one")
    old(file)
    stat, first = file.stat(), digest_of(file, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(cache.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert digest_of(file, tmp_path / "cache") == first
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_of(file, tmp_path / "cache") != first


def test_a_file_that_has_just_been_written_is_not_remembered(tmp_path):
    file = tmp_path / "rows"
    file.write_text("one")
    digest_of(file, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
