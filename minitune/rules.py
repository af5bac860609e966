"""What a knob may be: a kind, read off its annotation, and rules, as in `r: Annotated[int, at_least(1)] = 16`."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class Rule:
    """What a value of the right kind must be besides, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()  # where there are only so many to choose from


def at_least(least: int) -> Rule:
    return Rule(f"at least {least}", lambda value: value >= least)


def above(limit: int) -> Rule:
    return Rule(f"above {limit}", lambda value: value > limit)


def all_above(limit: int) -> Rule:
    return Rule(f"each above {limit}", lambda values: all(value > limit for value in values))


def below(limit: int) -> Rule:
    return Rule(f"below {limit}", lambda value: value < limit)


def filled() -> Rule:
    return Rule("not empty", bool)


def unrepeated() -> Rule:
    return Rule("without repeats", lambda items: len(set(items)) == len(items))


def one_of(names: tuple[str, ...]) -> Rule:
    """A string, or each of a list, is one of these."""
    return Rule(" | ".join(names), lambda value: set(as_list(value)) <= set(names), names)


@dataclass(frozen=True)
class Knob:
    kind: type  # one of KINDS
    rules: tuple[Rule, ...]
    default: Any

    @property
    def words(self) -> str:
        kind = [] if self.kind is str and self.rules else [KINDS[self.kind]]
        return ", ".join([*kind, *(rule.words for rule in self.rules)])

    def what_is_wrong(self, value: Any) -> str | None:
        """Why the value, as TOML gave it, will not do; None if it will."""
        if not FITS[self.kind](value):
            return f"must be {KINDS[self.kind]}, but is {shown(value)}"
        broken = next((rule for rule in self.rules if not rule.holds(value)), None)
        if broken is None:
            return None
        unknown = next((item for item in as_list(value) if item not in broken.names), "") if broken.names else ""
        near = get_close_matches(unknown.lower(), broken.names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"must be {broken.words}, but is {shown(value)}{hint}"


def knob(annotation: Any, default: Any) -> Knob:
    """The knob of a dataclass field."""
    rules: list[Rule] = []
    if get_origin(annotation) is Annotated:
        annotation, *rules = get_args(annotation)
    if get_origin(annotation) is Literal:
        annotation, rules = str, [one_of(get_args(annotation)), *rules]
    kind = list if get_args(annotation)[:1] == (float,) else get_origin(annotation) or annotation
    return Knob(kind, tuple(rules), default)


def is_text(value: Any) -> bool:
    """A string that can be a path and be written as UTF-8; an argument in another encoding arrives as surrogates."""
    return isinstance(value, str) and not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)


KINDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    tuple: "a list of non-empty strings",
    list: "a list of numbers",
    dict: "a table of strings",
}
FITS: dict[type, Callable[[Any], bool]] = {
    str: is_text,
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int,  # to Python true is an int
    float: lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,  # which nan is not
    tuple: lambda value: isinstance(value, list) and all(is_text(item) and item for item in value),
    list: lambda value: isinstance(value, list) and all(FITS[float](item) for item in value),
    dict: lambda value: isinstance(value, dict) and all(is_text(item) for item in value.values()),
}


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def shown(value: Any) -> str:
    """A value for a message, about as TOML writes it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
