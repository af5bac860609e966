"""What a knob may be: a kind, read off its annotation, and rules, as in `r: Annotated[int, at_least(1)] = 16`."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

from minitune import secrets


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
    return Rule(f"each above {limit}", lambda values: all(value > limit for value in numbers(values)))


def all_at_least(least: int) -> Rule:
    return Rule(f"each at least {least}", lambda values: all(value >= least for value in numbers(values)))


def below(limit: int) -> Rule:
    return Rule(f"below {limit}", lambda value: value < limit)


def filled() -> Rule:
    return Rule("not empty", bool)


def unrepeated() -> Rule:
    return Rule("without repeats", lambda value: all(len(set(each)) == len(each) for each in lists(value)))


def one_of(names: tuple[str, ...]) -> Rule:
    """A string, or each of a list, is one of these."""
    return Rule(" | ".join(names), lambda value: set(as_list(value)) <= set(names), names)


def ending_in(names: tuple[str, ...]) -> Rule:
    """Each of a list is one of these, or a path that ends in one, as layers.3.mlp.up_proj."""
    return Rule(" | ".join(names), lambda value: not lists(value) or {*map(last_name, value)} <= {*names}, names)


def expressions() -> Rule:
    """Text, if it is no list, or each key of a table is a regular expression."""
    return Rule("a regular expression", lambda value: isinstance(value, list) or all(map(compiles, as_list(value))), ())


@dataclass(frozen=True)
class Knob:
    kind: Any  # one of KINDS
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
    return Knob(annotation, tuple(rules), default)


def is_text(value: Any) -> bool:
    """A string that can be a path and be written as UTF-8; an argument in another encoding arrives as surrogates."""
    return isinstance(value, str) and not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)


def is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def is_table(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(of, value.values()))


def is_whole(value: Any) -> bool:
    return type(value) is int  # to Python true is an int


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # which nan is not


def is_filled(value: Any) -> bool:
    return is_text(value) and value != ""


KINDS: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    tuple[str, ...]: "a list of non-empty strings",
    tuple[int, ...]: "a list of whole numbers",
    tuple[float, ...]: "a list of numbers",
    dict[str, str]: "a table of strings",
    dict[str, int]: "a table of whole numbers",
    dict[str, float]: "a table of numbers",
    str | tuple[str, ...]: "text or a list of non-empty strings",
    tuple[int, ...] | dict[str, list[int]]: "a list of whole numbers or a table of such lists",
}
FITS: dict[Any, Callable[[Any], bool]] = {
    str: is_text,
    bool: lambda value: isinstance(value, bool),
    int: is_whole,
    float: is_number,
    tuple[str, ...]: lambda value: is_list(value, is_filled),
    tuple[int, ...]: lambda value: is_list(value, is_whole),
    tuple[float, ...]: lambda value: is_list(value, is_number),
    dict[str, str]: lambda value: is_table(value, is_text),
    dict[str, int]: lambda value: is_table(value, is_whole),
    dict[str, float]: lambda value: is_table(value, is_number),
    str | tuple[str, ...]: lambda value: is_filled(value) or is_list(value, is_filled),
    tuple[int, ...] | dict[str, list[int]]: lambda value: (
        is_list(value, is_whole) or is_table(value, lambda ids: is_list(ids, is_whole))
    ),
}


def as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def lists(value: Any) -> list[list[Any]]:
    """The lists in a value: itself, or those of a table."""
    return [each for each in (value.values() if isinstance(value, dict) else [value]) if isinstance(each, list)]


def numbers(value: Any) -> list[Any]:
    """The numbers in a list, or a table of them or of lists of them."""
    alone = [each for each in value.values() if not isinstance(each, list)] if isinstance(value, dict) else []
    return [*alone, *(each for some in lists(value) for each in some)]


def last_name(path: str) -> str:
    return path.rpartition(".")[2]


def compiles(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except (re.error, RecursionError, OverflowError):
        return False


def shown(value: Any) -> str:
    """A value for a message, about as TOML writes it."""
    return secrets.shortened(json.dumps(value, ensure_ascii=False, default=str), 80)
