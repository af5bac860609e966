"""What a script found out, for a person or a program: text, a page with --html, an object with --json."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from minitune import files
from minitune.errors import RunFailed, UserError


@dataclass(frozen=True)
class Wanted:
    """How a person asked for it."""

    html: Path | None  # where to write a page, too
    json: bool  # one object instead of the text


def wanted(arguments: list[str], usage: str) -> tuple[Wanted, list[str]]:
    """What `[--html FILE] [--json]` ask for, and the arguments besides; with -h or --help the usage is printed.

    Raises:
        UserError: no page can be written there.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--html", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        print(usage)
    if options.html and not options.html.parent.is_dir():
        raise UserError(f"--html: there is no folder {options.html.parent}")
    if options.html and options.html.is_dir():
        raise UserError(f"--html: {options.html} is a folder; name a file in it")
    if options.html:
        check_takes_files(options.html.parent)
    return Wanted(options.html, options.json), rest


def show(
    wanted: Wanted, text: Callable[[bool], str], html: Callable[[], str], as_object: Callable[[], Mapping[str, Any]]
) -> None:
    """Write and print what is wanted of it. `text` is asked with whether it is to be in colour, and ends its line."""
    if wanted.html:
        try:
            files.write_text(wanted.html, html())
        except OSError as error:
            raise RunFailed(f"--html: {wanted.html} cannot be written ({error.strerror or error})") from None
    if wanted.json:
        say(json.dumps(as_object()) + "\n")
        return
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character
    end = f"\nThe page is in {wanted.html}\n" if wanted.html else ""
    say(text(in_colour(sys.stdout)) + end)


def check_takes_files(folder: Path) -> None:
    """Before any work: of some folders, such as /proc, only trying tells."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--html: no file can be written in {folder} ({error.strerror or error})") from None


def say(text: str) -> None:
    """Print all of it, or say why not; whoever reads may have seen enough before its end, as `| head` has."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes as Python ends
        if not isinstance(error, BrokenPipeError):
            raise RunFailed(f"what was found out cannot be printed ({error.strerror or error})") from None


def in_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """NO_COLOR forbids it, FORCE_COLOR asks for it (no-color.org, force-color.org), else a terminal has it."""
    if environment.get("NO_COLOR"):
        return False
    return bool(environment.get("FORCE_COLOR")) or (stream.isatty() and environment.get("TERM") != "dumb")
