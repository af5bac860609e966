"""Meets hostile cases in this one process, whose memory is limited, and prints how each ended: a JSON line a case.

    python run_hostile.py FOLDER < names of cases, a line each

The limits: 500 MB beyond what the process holds when all is imported, and an alarm where a case takes too long.
"""

import contextlib
import importlib.util
import io
import json
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from hostile_files import CASES, SOUND

from minitune import errors

MEMORY, SECONDS = 500_000_000, 30
ROOT = Path(__file__).parents[1]


def main(folder: Path, names: list[str]) -> None:
    make = {case.name: case.make for case in CASES} | {f"sound {kind}": sound for kind, sound in SOUND.items()}
    for kind, sound in SOUND.items():  # what is imported late is imported now
        end(sound(folder / kind))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for name in names:
        place = folder / "case"
        arguments = make[name](place)
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
        started, waited = time.process_time(), time.monotonic()
        code, said = end(arguments)
        took = {"cpu": time.process_time() - started, "seconds": time.monotonic() - waited}
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(json.dumps({"name": name, "code": code, "said": said, "canary": (place / "canary").exists(), **took}))
        sys.stdout.flush()
        shutil.rmtree(place)


def end(arguments: list[str]) -> tuple[int, str]:
    """Run a script as if it had been started; its exit code and what it wrote to stderr, a traceback included."""
    spec = importlib.util.spec_from_file_location("script", ROOT / arguments[0])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.argv = arguments
    out, err = sys.stdout, io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            errors.run(script.main)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException as error:
        code = 1
        err.write(f"Traceback: {type(error).__name__}: {str(error)[:1000]}")
    finally:
        signal.alarm(0)
        sys.stdout, sys.stderr = out, sys.__stderr__
    return code, err.getvalue()


class TooSlow(BaseException):
    """A case is not refused in time."""


def too_slow(*_: object) -> None:
    raise TooSlow


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, too_slow)
    main(Path(sys.argv[1]), sys.stdin.read().splitlines())
