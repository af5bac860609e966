"""A run outlives whoever watches it: `| head` that has seen enough, a terminal that is closed, a log's full disk."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Outlived:
    """A stream that takes what is written to it, and drops it once nobody can have it any more."""

    def __init__(self, stream: TextIO, name: str, beside: TextIO) -> None:
        """`beside` is told, once, when the stream called `name` is gone."""
        self.stream, self.name, self.beside = stream, name, beside

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError as error:
            self.give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """From here on the descriptor leads nowhere, for libraries and the interpreter's own end as well."""
        with suppress(OSError, ValueError):  # a stream may have no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        with suppress(OSError):
            words = "cannot be written to any more; the run goes on without it, and metrics.jsonl has its numbers"
            print(f"{self.name} ({error.strerror}) {words}", file=self.beside, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def outlived() -> Iterator[None]:
    """Within the block a broken stdout or stderr ends nothing."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Outlived(out, "stdout", err), Outlived(err, "stderr", out)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
