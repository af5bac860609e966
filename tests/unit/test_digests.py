"""sha256 of large files, remembered: only as long as the file is certain to be the same."""

import os
from pathlib import Path

import pytest

from minitune import digests, files


def test_a_large_file_is_digested_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALL", 10)
    monkeypatch.setattr(digests, "TICK", 0.0)
    read, real = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or real(path))
    large = tmp_path / "large"
    large.write_bytes(b"a" * 100)
    assert digests.sha256(large) == digests.sha256(large) == real(large) and len(read) == 1
    times = large.stat()
    large.write_bytes(b"b" * 100)
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    assert digests.sha256(large) == real(large) and len(read) == 2
    copy = tmp_path / "copy"
    copy.write_bytes(b"c" * 100)
    os.replace(copy, large)
    assert digests.sha256(large) == real(large) and len(read) == 3
    for remembered in (tmp_path / "cache").rglob("*"):
        if remembered.is_file():
            remembered.write_text("no digest")
    assert digests.sha256(large) == real(large)
    monkeypatch.setattr(digests, "TICK", 3600.0)  # what has changed just now is not remembered
    large.write_bytes(b"d" * 100)
    count = len(read)
    assert digests.sha256(large) == digests.sha256(large) == real(large) and len(read) == count + 2


def test_what_others_can_write_to_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALL", 10)
    monkeypatch.setattr(digests, "TICK", 0.0)
    large = tmp_path / "large"
    large.write_bytes(b"a" * 100)
    right = digests.sha256(large)
    [remembered] = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    remembered.write_text("0" * 64)
    assert digests.sha256(large) == "0" * 64  # it is what is looked at
    remembered.parent.chmod(0o777)
    assert digests.sha256(large) == right == files.sha256(large)
