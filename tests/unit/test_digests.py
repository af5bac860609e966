"""Digests of large files are remembered, and a remembered one is believed only where it must still be true."""

import hashlib
import os
from pathlib import Path

import pytest

from minitune import digests, files


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that were read from end to end; every file is large, and old enough to be remembered."""
    paths: list[Path] = []
    plain = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: (paths.append(path), plain(path))[1])
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "TICK", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return paths


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def true(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_once(read, large):
    assert digests.sha256(large) == digests.sha256(large) == true(large)
    assert read == [large]


def test_changed_bytes_are_noticed_though_size_and_time_are_put_back(read, large):
    digests.sha256(large)
    before = os.stat(large)
    large.write_bytes(b"Weights")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(large).st_mtime_ns == before.st_mtime_ns
    assert digests.sha256(large) == true(large)
    assert read == [large, large]


def test_another_file_under_the_name_is_noticed(read, large, tmp_path):
    digests.sha256(large)
    other = tmp_path / "other"
    other.write_bytes(b"Weights")
    os.replace(other, large)
    assert digests.sha256(large) == true(large)


def test_a_file_that_has_just_changed_is_not_remembered(read, large, monkeypatch):
    monkeypatch.setattr(digests, "TICK", 3.0)
    digests.sha256(large)
    digests.sha256(large)
    assert read == [large, large]


def test_small_files_are_always_read(read, large, monkeypatch):
    monkeypatch.setattr(digests, "SMALL", 100)
    digests.sha256(large)
    digests.sha256(large)
    assert read == [large, large]


def lie(large: Path) -> Path:
    """A digest in the cache that is not the file's."""
    digests.sha256(large)
    [remembered] = digests.folder().iterdir()
    remembered.write_text("0" * 64)
    return remembered


def test_what_others_could_have_written_is_not_believed(read, large):
    lie(large)
    assert digests.sha256(large) == "0" * 64  # the lie is one where it is believed: this user's own folder
    for mode in (0o770, 0o707, 0o777):
        os.chmod(digests.folder(), mode)
        assert digests.sha256(large) == true(large)
        lie(large)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_cache_is_not_believed(read, large):
    lie(large)
    os.chown(digests.folder(), 65534, 65534)
    assert digests.sha256(large) == true(large)


@pytest.mark.parametrize("place", ["fifo", "folder", "link", "short", "long"])
def test_what_is_no_digest_is_not_believed(read, large, place, tmp_path):
    remembered = lie(large)
    remembered.unlink()
    if place == "fifo":
        os.mkfifo(remembered)
    elif place == "folder":
        remembered.mkdir()
    elif place == "link":
        (tmp_path / "elsewhere").write_text("0" * 64)
        remembered.symlink_to(tmp_path / "elsewhere")
    else:
        remembered.write_text("0" * {"short": 10, "long": 1000}[place])
    assert digests.sha256(large) == true(large)


def test_a_home_that_cannot_be_written_to_costs_time_alone(read, large, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert digests.sha256(large) == digests.sha256(large) == true(large)
    assert read == [large, large]
