"""Files are seen whole or not at all, and a sealed folder says which of its files is not as it was."""

import os
import subprocess

import pytest

from qwenlora.run.disk import SUMS, broken_seal, seal, settle, sha256, write_atomically

FILES = {"a.bin": bytes(range(256)) * 40, "名字.json": b"{}", "edited.json": b"1"}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    seal(tmp_path, but="edited.json")
    return tmp_path


def test_a_sealed_folder_is_as_it_was_for_us_and_for_sha256sum(folder):
    assert broken_seal(folder) == ""
    said = subprocess.run(
        ["sha256sum", "--check", SUMS], cwd=folder, capture_output=True, text=True, check=True
    )
    assert said.stdout.count(": OK\n") == 2


def test_a_folder_without_a_seal_breaks_none(tmp_path):
    assert broken_seal(tmp_path) == ""


def test_the_file_that_people_may_edit_and_new_ones_break_nothing(folder):
    (folder / "edited.json").write_text("2")
    (folder / "notes.txt").write_text("mine")
    assert broken_seal(folder) == ""


@pytest.mark.parametrize("place", [0, 5000, 10239])
def test_each_bit_counts(folder, place):
    content = bytearray(FILES["a.bin"])
    content[place] ^= 4
    (folder / "a.bin").write_bytes(content)
    assert broken_seal(folder) == "has a.bin with other bytes than were written (SHA-256)"


def test_a_file_that_is_gone_is_named(folder):
    (folder / "名字.json").unlink()
    assert broken_seal(folder) == "lacks 名字.json"


@pytest.mark.parametrize("text", ["", "nonsense\n", f"{'0' * 64}  ../a.bin\n", f"{'0' * 63}  a.bin\n"])
def test_a_seal_that_is_damaged_is_no_seal(folder, text):
    (folder / SUMS).write_text(text)
    assert broken_seal(folder) == f"has a {SUMS} that is damaged"


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_atomically(file, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


def test_files_that_a_library_closed_are_open_to_those_whom_the_umask_lets_in(tmp_path):
    (tmp_path / "a").touch(mode=0o600)
    before = os.umask(0o027)
    try:
        assert settle(tmp_path) == [tmp_path / "a"]
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_hash_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
