"""One run to a folder: races for it, locks left behind, and finished runs started again."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import mutants
from forked import Lost, Plant
from outcome import must_equal, tree
from points import REAL, before_call
from rows import Case, Row, must, must_end_well, must_refuse
from world import METHODS

from minitune import lock, train


def race(case: Case, together: bool = False, mutant: tuple[Plant, ...] = ()) -> None:
    """Two runs started at once: one trains, and the other is refused or finds it finished. Half of the races are for
    a folder that a killed run left behind."""
    method = METHODS[case.index % len(METHODS)]
    if case.index % 2:
        case.go_on_from(method)
    trained = case.folder / "trained"
    runs = [case.world.start(case.run, method, *mutant, before_call(train, "take_step", 1, partial(tick, trained)))]
    if not together:
        time.sleep(case.draw.choice((0.0, case.draw.uniform(0, case.world.seconds[method]))))
    runs += [case.world.start(case.run, method, *mutant, before_call(train, "take_step", 1, partial(tick, trained)))]
    for ended in [run.wait() for run in runs]:
        if ended.code:
            must_refuse(ended)
            must(str(case.run) in ended.err, f"does not name the folder: {ended.said()}")
    must(trained.read_text() == "x", f"{len(trained.read_text())} runs trained in one folder")
    must_equal(case.run, case.world.straight[method])


def tick(told: Path) -> None:
    handle = REAL["open"](told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    REAL["write"](handle, b"x")
    os.close(handle)


# ---- what a lock may look like -------------------------------------------------------------------------------------


def words(**changes: object) -> str:
    """What a run writes into its lock: of this very process, unless changed."""
    return json.dumps(lock.myself() | changes)


def left_behind(text: str) -> Callable[[Case], Plant]:
    def prepare(case: Case) -> Plant:
        (case.run / lock.NAME).write_text(text)
        return nothing

    return prepare


def nothing() -> None:
    """A plant that changes nothing."""


def no_locks() -> None:
    """A file system that has no locks, as some network ones."""

    def lockf(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.lockf = lockf


def without_locks(text: str) -> Callable[[Case], Plant]:
    def prepare(case: Case) -> Plant:
        left_behind(text)(case)
        return no_locks

    return prepare


def link(case: Case) -> Plant:
    (case.folder / "precious").write_text("precious")
    (case.run / lock.NAME).symlink_to(case.folder / "precious")
    return nothing


def second_name(case: Case) -> Plant:
    (case.folder / "precious").write_text("precious")
    os.link(case.folder / "precious", case.run / lock.NAME)
    return nothing


def folder(case: Case) -> Plant:
    (case.run / lock.NAME).mkdir()
    return nothing


def pipe(case: Case) -> Plant:
    os.mkfifo(case.run / lock.NAME)
    return nothing


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""


def live(case: Case) -> Plant:
    """A process that holds it; it is ended with the run's start, for the folder to be free afterwards."""
    path = case.run / lock.NAME
    path.write_text(words())
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    HOLDERS.append(holder)
    return nothing


HOLDERS: list[subprocess.Popen] = []
GONE = 2**22 - 7  # a process that is not there

LOCKS: list[tuple[str, Callable[[Case], Plant], bool]] = [  # name, how it comes to be, whether the run may go on
    ("of a process that has ended", left_behind(words(pid=GONE)), True),
    ("of another process of the same number", left_behind(words(started=1)), True),
    ("of another host, unlocked", left_behind(words(host="elsewhere")), True),
    ("of before a reboot", left_behind(words(boot="another")), True),
    ("empty", left_behind(""), True),
    ("garbage", left_behind("\0{[" * 999), True),
    ("not what a run writes", left_behind('[{"pid": 1e400}]'), True),
    ("held by a live process", live, False),
    ("a link", link, False),
    ("a second name of a file", second_name, False),
    ("a folder", folder, False),
    ("a pipe", pipe, False),
    ("no locks here: of a process that has ended", without_locks(words(pid=GONE)), True),
    ("no locks here: of before a reboot", without_locks(words(boot="another")), True),
    ("no locks here: of another host", without_locks(words(host="elsewhere")), False),
    ("no locks here: of a live process", without_locks(words()), False),
]


def find_a_lock(case: Case, chosen: list[tuple] = LOCKS, mutant: tuple[Plant, ...] = ()) -> None:
    """A lock in the folder: recovered where nobody holds it, else refused, and whatever it is left as it was."""
    name, prepare, recovered = chosen[case.index % len(chosen)]
    case.go_on_from("lora")
    with suppress(FileNotFoundError):
        (case.run / lock.NAME).unlink()
    plant = prepare(case)
    try:
        ended = case.world.run(case.run, "lora", plant, *mutant)
    finally:
        for holder in HOLDERS:
            holder.kill()
            holder.wait()
        HOLDERS.clear()
    if (precious := case.folder / "precious").exists():
        must(precious.read_text() == "precious", f"{name}: what it is a name of was overwritten")
    if recovered:
        must_end_well(ended)
    else:
        must_refuse(ended, (2,))
        must(lock.NAME in ended.err or str(case.run) in ended.err, f"{name}: not named: {ended.said()}")
        if (path := case.run / lock.NAME).is_dir():
            path.rmdir()
        else:
            path.unlink()
        must_end_well(case.world.run(case.run, "lora"))
    must_equal(case.run, case.world.straight["lora"])
    must(not os.path.lexists(case.run / lock.NAME), f"{name}: left behind")


RECOVERED, REFUSED = ([row for row in LOCKS if row[2] is kind] for kind in (True, False))


# ---- finished runs -------------------------------------------------------------------------------------------------


def restart(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """A finished run started again, and again: exit 0, and no byte, name or time of a file changes."""
    method = METHODS[case.index % len(METHODS)]
    must_end_well(case.world.run(case.run, method))
    before = tree(case.run)
    for _ in range(2):
        must_end_well(case.world.run(case.run, method, *mutant))
        if changed := {name for name in before | tree(case.run) if before.get(name) != tree(case.run).get(name)}:
            raise Lost(f"changed: {', '.join(sorted(changed)[:5])}")


def restart_as_another(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """Its checkpoints deleted and what it handed over edited, and started by another recipe: refused by the keys that
    differ, and nothing is written."""
    method = METHODS[case.index % len(METHODS)]
    must_end_well(case.world.run(case.run, method))
    edit(case.run)
    if case.index % 2 == 0:
        shutil.rmtree(case.run / "checkpoints")
    before = tree(case.run)
    ended = case.world.run(case.run, method, *mutant, overrides=("seed=4",))
    must_refuse(ended, (2,))
    must("seed: 3 then, 4 now" in ended.err, f"does not say what differs: {ended.said()}")
    must(tree(case.run) == before, "the refused run has written something")


def restart_edited(case: Case, mutant: tuple[Plant, ...] = ()) -> None:
    """What it handed over edited, and started again: made anew, and what was edited is set aside whole."""
    method = METHODS[case.index % len(METHODS)]
    must_end_well(case.world.run(case.run, method))
    name, text = edit(case.run)
    ended = case.world.run(case.run, method, *mutant)
    must_end_well(ended)
    must_equal(case.run, case.world.straight[method])
    kept = case.run / f"{name.parent.name}.kept" / name.name
    must(kept.is_file() and kept.read_text() == text, f"{name} is lost")
    must(str(kept.parent) in ended.out, f"not said where: {ended.said()}")


def edit(run: Path) -> tuple[Path, str]:
    """As a person edits a file of what was handed over; which, and its text."""
    [name] = [name for name in (run / "adapter/adapter_config.json", run / "model/config.json") if name.exists()]
    text = name.read_text().replace("{", '{"edited": true, ', 1)
    name.write_text(text)
    return name, text


ROWS = [
    Row("two runs at once in a folder", race, partial(race, together=True, mutant=(mutants.no_lock,)), full=10, pr=3),
    Row(
        "locks left in a folder",
        find_a_lock,
        partial(find_a_lock, chosen=[*RECOVERED[:2], *REFUSED[:2]], mutant=(mutants.swap_locks,)),
        full=len(LOCKS),
        pr=len(LOCKS),
        controls=4,
    ),
    Row("finished runs started again", restart, partial(restart, mutant=(mutants.never_finished,)), full=3, pr=1),
    Row(
        "finished runs started by another recipe",
        restart_as_another,
        partial(restart_as_another, mutant=(mutants.anyones,)),
        full=6,
        pr=2,
    ),
    Row(
        "finished runs with an edited file",
        restart_edited,
        partial(restart_edited, mutant=(mutants.nothing_kept,)),
        full=6,
        pr=2,
    ),
]
