"""SIGTERM, SIGINT and SIGHUP: asked once, a run ends in order; asked twice, at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from minitune.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """Whether a signal has asked the run to stop, and what happens when one does."""

    def __init__(self) -> None:
        self.noted = 0  # the last signal that this process got; 0 while none came
        self.signum = 0  # the signal that asks the run to stop, as all its processes saw it when they looked last
        self.among: Callable[[int], int] = int  # makes of one process' signal that of all
        self.patient = False  # the run will look here and end by itself

    def __bool__(self) -> bool:
        return self.signum != 0

    def look(self) -> None:
        """See whether a signal came. All processes of a run look at the same places, and see the same."""
        self.signum = self.among(self.noted)

    def interrupted(self, how: str) -> Interrupted:
        """What the run ends with."""
        return Interrupted(self.signum, f"{signal.Signals(self.signum).name}: stopped {how}; run again to go on")

    def heed(self) -> None:
        """End the run here if this process has been asked to stop."""
        if self.noted:
            self.signum = self.noted
            raise self.interrupted("before it was done")

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Within the block a signal is only noted, for the block to look at; outside, it ends what is being done."""
        self.patient = True
        self.heed()
        try:
            yield
        finally:
            self.patient = False
        self.heed()


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within the block the first of SIGNALS asks the run to stop, and the next one has its usual effect. A SIGHUP that
    is ignored, as nohup asks, stays so."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield stop
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def note(signum: int, frame: FrameType | None) -> None:
        stop.noted = signum
        for each in before:
            signal.signal(each, second(before[each]))
        if not stop.patient:
            stop.heed()

    for signum in before:
        signal.signal(signum, note)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def second(before: object) -> object:
    """What the second signal does: as it did before; in a program, Ctrl-C ends it even in the middle of a kernel."""
    interactive = hasattr(sys, "ps1")  # there it must not end the whole session
    return signal.SIG_DFL if before is signal.default_int_handler and not interactive else before
