"""What must not be shown or written down: tokens, keys and passwords, wherever a text came by them.

`hidden` takes them out of a text. It stands where text leaves the program: `guard_streams` puts it around stdout and
stderr, so that tracebacks, warnings and libraries' prints go through it too, and files.py around what is written.
Secrets are the values of environment variables and settings that are named like one, whatever has the form of a
well-known kind of token, and passwords in URLs. A value that stands in this program's source is none: all can read it
there, and the keys of the run's files and the names of its tensors are made of such words.
"""

import base64
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN, BLACK = "[hidden]", "\u2588"
SHORTEST = 6  # characters: a shorter value stands in too many other words
WORDS = (
    *("token", "tokens", "key", "keys", "apikey", "secret", "secrets", "pass", "passwd", "password", "passwords"),
    *("passphrase", "pw", "pwd", "pat", "auth", "authorization", "bearer", "cookie", "credential", "credentials"),
    *("cred", "creds", "sig", "signature", "sas", "jwt", "passcode"),
)
ENDINGS = (
    *("token", "apikey", "secret", "passwd", "password", "passphrase", "passcode", "pass", "credentials"),
    *("secretkey", "accesskey", "authkey", "encryptionkey", "masterkey", "privatekey", "signingkey"),
)
KNOWN_FORMS = re.compile(  # of Hugging Face, OpenAI and its like, GitHub, GitLab, Slack, AWS, Google, JWT, HTTP
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abps]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}[\w.-]*)"
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
)
USER_IN_URL = re.compile(  # up to the last @: a password may hold a slash, where something is before a colon
    r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s/:@'\"<>]*:[^\s'\"<>]*|[^\s/@'\"<>]+)@"
)
QUERY = re.compile(r"(?P<name>[?&;#](?:[\w.~-]|%[0-9A-Fa-f]{2})+=)(?P<value>[^\s&;#'\"<>]+)")
BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
PIECES = re.compile(r"[^\s,=\[\]{}\"']+")  # of a list or a table, whole or not
PAIRS = re.compile(r"([\w.-]+)[\"']?\s*=\s*[\[\"'\s]*([^\s,\]}\"']+)")
noted: set[str] = set()  # values of settings that are named like a secret


def hidden(text: str) -> str:
    """`text` with [hidden] in place of each secret."""
    return without(known(), text)


def blacked_out(text: str) -> str:
    """`text` with each secret written over, character by character: what is cut out of it is at the same place."""
    return without(known(), text, lambda secret: BLACK * len(secret))


def known() -> list[str]:
    """What the environment and the settings hold, in each form, the longest first."""
    values = sorted({*environment(), *noted}, key=len, reverse=True)
    return [form for value in values if not is_public(value) for form in forms(value)]


def without(secrets: list[str], text: str, instead: Callable[[str], str] = lambda secret: HIDDEN) -> str:
    """`text` without these, and without all that has the form of a secret."""
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, instead(secret))
    if "://" in text:
        text = USER_IN_URL.sub(lambda found: f"{found['scheme']}{instead(found['user'])}@", text)
    if "=" in text:
        text = QUERY.sub(
            lambda found: found["name"] + instead(found["value"]) if is_name(found["name"]) else found[0], text
        )
    if "PRIVATE KEY" in text:
        text = BLOCK.sub(lambda found: instead(found[0]), text)
    return KNOWN_FORMS.sub(lambda found: instead(found[0]), text)


def shortened(text: str, most: int, last: bool = False) -> str:
    """At most so many characters of a text, its beginning or its end. Secrets are hidden first: half of one is not
    known for a secret any more."""
    text = hidden(text)
    if len(text) <= most:
        return text
    return f"...{text[3 - most :]}" if last else f"{text[: most - 3]}..."


def hidden_in(value: Any) -> Any:
    """A JSON value without secrets in its texts. The name of a file that is there is left alone: it is no secret, and
    a run is known again by the names of its files."""
    secrets = known()

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            text = without(secrets, value)
            return value if text == value or is_file(value) else text
        if isinstance(value, dict):
            return {clean(key): clean(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [clean(inner) for inner in value]
        return value

    return clean(value)


def note(name: str, value: Any) -> None:
    """Take a setting's value for a secret if its name says so, or the name of what is in it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            note(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            note(name, inner)
    elif isinstance(value, str) and len(value) >= SHORTEST and is_name(name):
        noted.add(value)


def note_arguments(arguments: Sequence[str]) -> None:
    """Do so for what stands on a command line as `key=value`, `key: value` or `--key value`, TOML or not."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if equals and "://" not in name:
            value = value.strip()
            note(name, value.strip("'\""))
            if value.startswith(("[", "{")):
                note(name, PIECES.findall(value))
                note("", dict(PAIRS.findall(value)))
        elif not equals and (pair := re.fullmatch(r"([\w.-]+):\s*(\S+)", argument)):
            note(pair[1], pair[2].strip("'\""))
        elif argument.startswith("-") and not following.startswith("-") and not following.isdecimal():
            note(argument, following)


def is_name(name: str) -> bool:
    """Whether what has this name is a secret: HF_TOKEN, DATABASE_PASS, hub.apiKey, X-Amz-Signature."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    words = [word.rstrip("0123456789") for word in re.split(r"[^a-z0-9]+", apart.lower()) if word]
    return any(word in WORDS or word.endswith(ENDINGS) for word in words)


def environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if name in ("PWD", "OLDPWD") or not is_name(name):
            continue
        for line in {value.strip(), *(line.strip() for line in value.splitlines())}:
            if len(line) >= SHORTEST and not is_file(line):
                yield line


@lru_cache(maxsize=256)
def forms(value: str) -> set[str]:
    """A secret as it stands, and as it stands in a URL, in JSON, in a `repr`, in HTML, or in base64."""
    written = {value, quote(value, safe=""), quote(value), quote_plus(value)}
    written |= {re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), form) for form in written}
    written |= {json.dumps(value)[1:-1], repr(value)[1:-1], escape(value)}
    data = value.encode(errors="surrogateescape")
    return written | {encode(data).decode().rstrip("=") for encode in (base64.b64encode, base64.urlsafe_b64encode)}


@lru_cache(maxsize=256)
def is_public(value: str) -> bool:
    """Whether this program says it itself, as `progress` or `q_proj`: a run's files would fall apart without it."""
    return value in source()


@lru_cache(maxsize=1)
def source() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py")))


def is_file(text: str) -> bool:
    return os.path.exists(text)


class Guarded:
    """A stream that hides secrets in all that is written to it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable(hidden(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def printable(text: str) -> str:
    """Without what moves a terminal's cursor or sets its title, the bar's own carriage return and colours aside; and
    without halves of characters, which no encoding can write."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"\x1b(?!\[[0-9;]*[mAKBCD])|[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f-\x9f]", "?", text)


def guard_streams() -> None:
    """From here on nothing that this process prints holds a secret."""
    note_arguments(sys.argv[1:])
    if not isinstance(sys.stdout, Guarded):
        sys.stdout, sys.stderr = Guarded(sys.stdout), Guarded(sys.stderr)
