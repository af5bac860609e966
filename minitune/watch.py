"""Ends a job in which one process hangs, and names it.

A process that waits for another looks just like one that hangs. So each counts how far it has come (`beat`), a thread
beside it writes the count down where all can see it, and every thread looks at all counts: when the lowest has not
moved for too long, those who are behind are what the others wait for. A process that raises says so in the same place.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch.distributed as dist

from minitune.errors import Interrupted, RunFailed, UserError

PATIENT = -1  # in place of a count: it is at something that may take any time, or waits for one who is
HOLDER_DIED = "rank 0 died, which holds the job together"
GRACE = 5.0  # seconds in which a job may end in order once it is known to have failed


@dataclass
class Pulse:
    """How far this process has come."""

    beats: int = 0
    patient: int = 0  # how many blocks of `patience` it is in


pulse = Pulse()


def beat() -> None:
    """One more place reached that all ranks reach. Costs nothing."""
    pulse.beats += 1


@contextmanager
def patience() -> Iterator[None]:
    """Within the block this process is not judged: it prepares, saves, or waits for one that does."""
    pulse.patient += 1
    try:
        yield
    finally:
        pulse.patient -= 1
        pulse.beats += 1


@contextmanager
def over(store: dist.Store, rank: int, world: int, timeout: float) -> Iterator[None]:
    """Watch over this process and the others while the block runs. What it raises is said once, with the rank whose
    fault it is."""
    watcher = Watcher(store, rank, world, timeout)
    watcher.start()
    try:
        yield
    except (UserError, Interrupted) as error:  # raised on all alike
        error.said = not watcher.is_first_to_say(str(error))
        watcher.stop()
        raise
    except BaseException as error:  # the watch goes on: it ends this process if that cannot end by itself
        try:
            if watcher.is_to_blame(error):
                error.said = isinstance(error, RunFailed)
                raise
            why = watcher.failure()
        except dist.DistError:
            why = HOLDER_DIED
        raise RunFailed(f"rank {rank} ends because {why}") from None
    watcher.stop()


class Watcher:
    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float) -> None:
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.over, self.ended = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watch", daemon=True)
        self.neighbours: dict[int, int] = {}  # ranks on this machine -> their process ids
        self.every = min(1.0, timeout / 20)  # seconds between two looks
        self.looks = self.answered = 0  # how many were begun, and how many came to an end
        now = time.monotonic()
        self.heard, self.heard_at = [""] * world, [now] * world  # what each rank last said, and when that was new
        self.counts, self.moved_at = [PATIENT] * world, [now] * world
        store.set(f"process/{rank}", json.dumps([socket.gethostname(), os.getpid()]))

    def start(self) -> None:
        self.thread.start()
        if self.rank:
            threading.Thread(target=self.guard, name="guard of the watch", daemon=True).start()

    def watch(self) -> None:
        while not self.over.wait(self.every):
            try:
                self.look()
                failed = self.failure()
                self.answered += 1
            except dist.DistError:
                failed = HOLDER_DIED
            if failed and not self.over.wait(GRACE):
                os._exit(1)  # the main thread waits for an answer that will not come

    def guard(self) -> None:
        """End this process where rank 0, which keeps what all have said, no longer answers: a look at it has no end
        then. Counts its own turns, not the clock's seconds, so that a process that was stopped itself is not late."""
        turns, answered = 0, -1
        while not self.ended.wait(self.every):
            turns, answered = (turns + 1, answered) if answered == self.answered else (0, self.answered)
            if turns * self.every > self.timeout:
                reason = f"rank 0 did not answer for {self.timeout:g} s (parallel.timeout_seconds)"
                print(f"failed: {reason}, as rank {self.rank} sees", file=sys.stderr, flush=True)
                self.end(0)
                time.sleep(GRACE)  # in which the launcher sees who it was
                os._exit(1)

    def look(self) -> None:
        """Tell the others how far this process has come, and see who has died or hangs."""
        self.looks += 1
        self.store.set(f"beats/{self.rank}", f"{self.looks} {PATIENT if pulse.patient else pulse.beats}")
        for rank in range(self.world):
            said, now = self.read(f"beats/{rank}"), time.monotonic()
            if said != self.heard[rank]:
                self.heard[rank], self.heard_at[rank] = said, now
            count = int(said.split()[1]) if said else PATIENT
            if count != self.counts[rank] or count == PATIENT:
                self.counts[rank], self.moved_at[rank] = count, now
        if dead := self.dead():
            self.blame(f"{named(dead)} died, as rank {self.rank} sees")
        elif behind := self.behind():
            reason = f"{named(behind)} did not move for {self.timeout:g} s (parallel.timeout_seconds)"
            if not self.blame(f"{reason}, as rank {self.rank} sees"):
                time.sleep(min(1.0, self.every))  # it may be one of them that says so, and has yet to print it
            for rank in behind:  # the launcher then sees who it was
                self.end(rank)

    def end(self, rank: int) -> None:
        """Kill a rank that is on this machine, if nobody has yet."""
        if rank in self.neighbours:
            with suppress(ProcessLookupError):
                os.kill(self.neighbours[rank], signal.SIGKILL)

    def behind(self) -> list[int]:
        """Those that have said nothing for too long; or, of ranks that all say how far they are, those with the lowest
        count, if they have not moved for too long."""
        now = time.monotonic()
        if frozen := [rank for rank in range(self.world) if now - self.heard_at[rank] > self.timeout]:
            return frozen
        if any(now - heard_at > 5 * self.every for heard_at in self.heard_at):
            return []
        judged = [rank for rank in range(self.world) if self.counts[rank] != PATIENT]
        lowest = min((self.counts[rank] for rank in judged), default=PATIENT)
        behind = [rank for rank in judged if self.counts[rank] == lowest]
        return behind if all(now - self.moved_at[rank] > self.timeout for rank in behind) else []

    def dead(self) -> list[int]:
        """Those of this machine that are gone without having come to their end."""
        if not self.neighbours:
            known = [self.read(f"process/{rank}") for rank in range(self.world)]
            if not all(known):
                return []  # not all have started
            places = dict(enumerate(map(json.loads, known)))
            self.neighbours = {rank: pid for rank, (host, pid) in places.items() if host == socket.gethostname()}
        gone = [rank for rank, pid in self.neighbours.items() if not alive(pid)]
        return [rank for rank in gone if not self.read(f"done/{rank}")]

    def stop(self) -> None:
        """This process has come to its end."""
        self.over.set()
        self.thread.join()
        self.store.set(f"done/{self.rank}", "yes")
        self.ended.set()
        until = time.monotonic() + GRACE
        everyone = [f"done/{rank}" for rank in range(self.world)]
        while self.rank == 0 and not self.store.check(everyone) and time.monotonic() < until:
            time.sleep(0.02)  # where no launcher holds the store, it ends with the first process

    def blame(self, reason: str) -> bool:
        """Write down why the job fails, and say so, if nobody has yet; whether it is this reason that stands."""
        stands = self.store.compare_set("failure", "", reason).decode() == reason
        if stands:
            print(f"failed: {reason}", file=sys.stderr, flush=True)
        return stands

    def failure(self) -> str:
        return self.read("failure")

    def read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def is_first_to_say(self, message: str) -> bool:
        digest = hashlib.sha256(message.encode()).hexdigest()
        return self.store.add(f"said/{digest}", 1) == 1

    def is_to_blame(self, error: BaseException) -> bool:
        """Whether the job ends because of this error, which is then said; not one that only lost another process.
        That one gives the launcher time to see who was first."""
        lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
        until = time.monotonic() + GRACE / 2
        while lost and not self.failure() and time.monotonic() < until:
            time.sleep(0.1)
        kind = "" if isinstance(error, RunFailed) else f"{type(error).__name__}: "
        if self.blame(f"rank {self.rank}: {kind}{error}"):
            return True
        time.sleep(GRACE / 2)
        return False


def named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
