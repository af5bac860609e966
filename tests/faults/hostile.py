"""Files made to harm whoever opens them (tests/hostile_files.py), each met by the command that it is made for."""

import resource
import sys
from pathlib import Path

import forked
from forked import Ended
from rows import Case, Row, must, must_refuse

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from hostile_files import CASES, SOUND  # noqa: E402  (where they are had to be said)

MEMORY = 500_000_000  # bytes beyond what a process holds that has its imports
SECONDS = 20.0  # on a machine that is busy with other injections


def refuse(case: Case) -> None:
    """Exit 2, one message that names the damage, in seconds and in bounded memory; no code of the file's is run."""
    number = case.index * len(CASES) // case.count
    hostile = CASES[number]
    folder = case.folder / "files"
    folder.mkdir()
    ended = meet(hostile.make(folder), case.folder)
    try:
        must_refuse(ended, (2,))
    except forked.Lost as lost:
        raise forked.Lost(f"{hostile.name}: {lost}") from None
    must(any(word in ended.err.lower() for word in hostile.words.split("|")), f"{hostile.name}: {ended.said()}")
    must(not (folder / "canary").exists(), f"{hostile.name}: its code was run")


def refuse_sound_files(case: Case) -> None:
    """The same folders without the damage: a harness that took these for refused would prove nothing."""
    kind = list(SOUND)[case.index % len(SOUND)]
    folder = case.folder / "files"
    folder.mkdir()
    must_refuse(meet(SOUND[kind](folder), case.folder), (2,))


def meet(arguments: list[str], folder: Path) -> Ended:
    script, *rest = arguments
    return forked.start(rest, folder / "said", limit_memory, script=ROOT / script).wait(SECONDS)


def limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))


ROWS = [
    Row("hostile files", refuse, refuse_sound_files, full=len(CASES), pr=12, controls=len(SOUND)),
]
