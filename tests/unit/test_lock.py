"""One run to a folder: live locks hold, stale ones do not, and run.lock is never what a link points to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from minitune import lock
from minitune.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from minitune import errors, lock
def main(arguments):
    with lock.hold(Path(arguments[0])):
        print("held", flush=True)
        {then}
errors.run(main)
"""
Holder = Callable[..., subprocess.Popen]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Holder]:
    """hold(then="...") starts a process that holds the lock of tmp_path, and waits until it does."""
    started = []

    def start(then: str = "time.sleep(100)", wait: bool = True) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD.format(then=then), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        if wait:
            assert process.stdout.readline() == "held\n", process.communicate()[1]
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def test_a_live_run_keeps_others_out_by_name(tmp_path: Path, hold: Holder) -> None:
    process = hold()
    said = json.loads((tmp_path / "run.lock").read_text())
    assert said["pid"] == process.pid and said["host"] == socket.gethostname()
    assert said["boot"] == lock.boot() and said["started"] == lock.started(process.pid) is not None
    with (
        pytest.raises(UserError, match=f"in use by process {process.pid} on '{socket.gethostname()}'"),
        lock.hold(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / "run.lock").read_text()) == said
    other = hold(wait=False)
    assert other.wait(60) == 2 and f"process {process.pid}" in other.stderr.read()


def test_it_is_gone_after_a_good_end_and_after_a_bad_one(tmp_path: Path) -> None:
    for error in (None, ValueError, KeyboardInterrupt):
        with suppress(ValueError, KeyboardInterrupt), lock.hold(tmp_path):
            assert (tmp_path / "run.lock").exists()
            if error:
                raise error
        assert not (tmp_path / "run.lock").exists()


def test_kill_9_leaves_a_stale_one_that_is_taken_over(
    tmp_path: Path, hold: Holder, capsys: pytest.CaptureFixture[str]
) -> None:
    process = hold()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run.lock").exists()
    with lock.hold(tmp_path):
        assert f"left behind by process {process.pid}" in capsys.readouterr().out
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run.lock").exists()


def test_a_child_of_a_dead_run_does_not_keep_its_lock(tmp_path: Path, hold: Holder) -> None:
    """A worker that outlives the run it was forked by has its files open."""
    process = hold(then="import os; (os.fork() == 0) and (os.close(1), os.close(2), time.sleep(20)); time.sleep(100)")
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.hold(tmp_path):
        pass


@pytest.mark.parametrize(
    "said",
    [
        "",
        "not JSON",
        "[1]",
        "{}",
        '{"pid": "x", "host": 3}',
        '{"pid": 1, "host": "elsewhere", "boot": "another", "started": 1}',
        "[" * 4000,
        json.dumps({"pid": 10**30, "host": "h" * 2000}),
    ],
)
def test_whatever_a_dead_one_says_it_is_taken_over(tmp_path: Path, said: str) -> None:
    (tmp_path / "run.lock").write_text(said)
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("kind", ["link", "dangling", "hard", "fifo", "folder"])
def test_what_is_no_plain_file_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    if kind != "dangling":
        precious.write_text("keep me")
    {
        "link": lambda path: path.symlink_to(precious),
        "dangling": lambda path: path.symlink_to(precious),
        "hard": lambda path: path.hardlink_to(precious),
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
    }[kind](run / "run.lock")
    with pytest.raises(UserError, match=r"run\.lock is in the way"), lock.hold(run):
        pass
    assert os.path.lexists(run / "run.lock")
    assert precious.exists() == (kind != "dangling") and (kind == "dangling" or precious.read_text() == "keep me")


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        with pytest.raises(UserError, match="this very process"), lock.hold(tmp_path):
            pass
        code = f"from pathlib import Path; from minitune import lock\nwith lock.hold(Path({str(tmp_path)!r})): pass"
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "in use by process" in refused.stderr  # asking has not let go of it


def test_a_folder_that_is_renamed_stays_locked_and_is_let_go(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with lock.hold(run):
        run.rename(tmp_path / "run.1")
    assert not list((tmp_path / "run.1").iterdir())


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    """Eight processes take turns at a folder, with stale locks and fresh deletions under way; never two inside."""
    code = """
import os, sys, time
from pathlib import Path
from minitune import lock
from minitune.errors import UserError
run, got, until = Path(sys.argv[1]), 0, time.time() + 2.5
while time.time() < until:
    try:
        with lock.hold(run):
            os.close(os.open(run / "inside", os.O_CREAT | os.O_EXCL))
            time.sleep(0.001)
            os.unlink(run / "inside")
            got += 1
    except UserError:
        pass
print(got)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(8)
    ]
    told = [process.communicate() for process in processes]
    assert not [errors for _, errors in told if errors]
    assert sum(int(got) for got, _ in told) > 20


def without_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "lock", lambda handle: False)


def test_without_kernel_locks_the_file_decides(
    tmp_path: Path, hold: Holder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = hold()
    without_kernel_locks(monkeypatch)
    with pytest.raises(UserError, match=f"process {process.pid} .*it is running.*delete"), lock.hold(tmp_path):
        pass
    said = json.loads((tmp_path / "run.lock").read_text())
    (tmp_path / "run.lock").write_text(json.dumps(said | {"host": "elsewhere"}))
    with pytest.raises(UserError, match="another machine"), lock.hold(tmp_path):
        pass
    for stale in ({"boot": "the one before"}, {"started": said["started"] - 1}, {"pid": 2**22 + 7}, {"pid": "x"}):
        (tmp_path / "run.lock").write_text(json.dumps(said | stale))
        with lock.hold(tmp_path):
            assert "left behind" in capsys.readouterr().out
