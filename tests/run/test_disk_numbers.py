"""What a disk can still take, and the permissions of what is written to it."""

import os

from qwenlora.run import disk


def test_free_space_and_files_are_those_of_the_disk_that_a_folder_is_on(tmp_path, monkeypatch):
    numbers = os.statvfs(tmp_path)
    assert disk.free_bytes(tmp_path) > 0
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 123}))
    assert disk.free_bytes(tmp_path) == 123
    monkeypatch.setattr(disk.os, "statvfs", lambda folder: numbers)
    assert disk.free_files(tmp_path) == numbers.f_favail


def test_settling_a_folder_leaves_the_umask_as_it_was(tmp_path):
    (tmp_path / "a").write_text("a")
    before = os.umask(0o027)
    try:
        (file,) = disk.settle(tmp_path)
        assert file.stat().st_mode & 0o777 == 0o640
        (tmp_path / "b").write_text("b")
        assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
