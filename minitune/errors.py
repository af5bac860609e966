"""How a program of minitune ends: 0 done, 2 the input was wrong, 1 anything else, 128 + n after signal n."""

import sys
from collections.abc import Callable
from contextlib import suppress

from minitune import secrets

LINE = 2000  # characters of a message that are shown; a file may have put anything into one


class UserError(Exception):
    """Something the user can mend: a key, a row, a file. The message is one clear sentence that says
    where it is and what to do; the program prints it without a traceback and exits with 2."""


class Interrupted(BaseException):
    """A signal asked the run to stop, and it did so in order. `signum` gives the exit code 128 + signum.

    No Exception, as KeyboardInterrupt is none: what a library does about its errors must not swallow it.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class RunFailed(Exception):
    """The run cannot go on, through no fault of the input: exit 1 with one message and no traceback."""


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main(arguments)` and leave the process with the exit code its ending asks for."""
    secrets.guard_streams()
    try:
        main(sys.argv[1:])
    except UserError as error:
        end(error, f"error: {error}", 2)
    except RunFailed as error:
        end(error, f"failed: {error}", 1)
    except Interrupted as error:
        end(error, str(error), 128 + error.signum)
    except KeyboardInterrupt as interrupt:
        end(interrupt, "interrupted", 130)


def end(error: BaseException, message: str, code: int) -> None:
    """Say `message` on stderr, unless another process of the run has said the same (`said`), and exit."""
    if not getattr(error, "said", False):
        lines = [obeyed_by_nobody(secrets.shortened(line, LINE)) for line in secrets.hidden(message).split("\n")]
        with suppress(OSError):  # nobody may be there to read it
            print("\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(code)


def obeyed_by_nobody(line: str) -> str:
    """A line in which what a terminal would obey, or nobody would see, is written out as its code point."""
    return "".join(c if c.isprintable() or c in "\t\xa0\u3000" else f"\\u{{{ord(c):x}}}" for c in line)
