"""A recipe, from TOML and `key.path=value`, and back."""

import json
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import tomli_w

from minitune import secrets
from minitune.config.keys import Config, knobs, sections, what_is_wrong
from minitune.config.together import COMMAND_LINE, contradictions, dependent_defaults
from minitune.errors import UserError
from minitune.foreign import read_bytes

LONGEST, DEEPEST = 1_000_000, 1000  # bytes of a recipe, and parts of a key in it
EXAMPLE = Path(__file__).parents[1] / "tiny" / "recipe.toml"  # what runs when no recipe is named
Problem = tuple[str, str]  # the recipe's file or COMMAND_LINE, and a sentence that begins with the key


class ConfigError(UserError):
    """All that is wrong with a recipe, a line each."""

    def __init__(self, problems: list[Problem]) -> None:
        if len(problems) == 1:
            super().__init__(": ".join(problems[0]))
            return
        problems = sorted(problems, key=lambda problem: problem[0] == COMMAND_LINE)  # the file's first
        places = " and ".join(dict.fromkeys(place for place, _ in problems))
        super().__init__("\n  ".join([f"{len(problems)} problems in {places}:", *(line for _, line in problems)]))


def load_config(arguments: list[str]) -> Config:
    """The recipe that a command line asks for: `[RECIPE.toml] [key.path=value ...]`; without a file, the example.

    -h or --help prints every key and exits. Raises ConfigError with all problems at once.
    """
    if {"-h", "--help"} & set(arguments):
        print(usage())
        raise SystemExit(0)
    recipe, overrides, problems = read_arguments(arguments)
    table, unreadable = read_recipe(recipe)
    problems += unreadable

    values: dict[str, Any] = {}
    given: dict[str, str] = {}  # key -> where it was set last
    wrong: set[str] = set()
    settings = [(str(recipe), key, value) for key, value in flat(table)]
    settings += [(COMMAND_LINE, key, value) for key, value in overrides]
    for place, key, value in settings:
        secrets.note(key, value)
        if complaint := what_is_wrong(key, value):
            problems.append((place, f"{key}: {complaint}"))
            wrong.add(key)
        elif key in knobs():
            values[key] = tuple(value) if isinstance(value, list) else value
            given[key] = place

    cfg = assemble(dependent_defaults(assemble(values)) | values)
    if not unreadable:  # else there is no telling what stands in it
        for keys, sentence in contradictions(cfg, given):
            if wrong.isdisjoint(keys):
                place = COMMAND_LINE if COMMAND_LINE in map(given.get, keys) else str(recipe)
                problems.append((place, f"{', '.join(keys)}: {sentence}"))
    if problems:
        raise ConfigError(problems)
    return cfg


def dump(cfg: Config) -> str:
    """The whole recipe as TOML; load_config reads it back to an equal Config."""
    return tomli_w.dumps(secrets.hidden_in(asdict(cfg)))


def usage() -> str:
    """Every key with its default and what it may be."""
    lines = ["[RECIPE.toml] [key.path=value ...]   no recipe: the built-in example", ""]
    for key, each in knobs().items():
        default = json.dumps(each.default)
        lines.append(f"  {f'{key} = {default}':46}  {each.words}")
    return "\n".join(lines)


def read_arguments(arguments: list[str]) -> tuple[Path, list[tuple[str, Any]], list[Problem]]:
    """The recipe's file, the overrides as (key, value), and what is neither."""
    recipe, overrides, problems = None, [], []
    for argument in arguments:
        key, equals, text = (part.strip() for part in argument.partition("="))
        if argument.startswith("-"):
            problems.append(f"{argument}: no such option; a key is set as key.path=value, and --help lists all")
        elif equals and not os.path.isfile(argument):
            try:
                overrides.append((key, read_value(text, knobs()[key].kind if key in knobs() else str)))
            except (ValueError, RecursionError):
                secrets.note(key, text)
                shown = secrets.shortened(text, 200)
                problems.append(
                    f"{key}: {shown} is not TOML; the strings in it need quotes that the shell leaves alone"
                )
        elif key in knobs() or key in sections():
            problems.append(f"{argument}: has no value; write it as key.path=value")
        elif recipe is None:
            recipe = Path(argument)
        else:
            problems.append(f"{argument}: a second recipe, after {recipe}; give one")
    return recipe or EXAMPLE, overrides, [(COMMAND_LINE, problem) for problem in problems]


def read_value(text: str, kind: Any) -> Any:
    """A value in TOML's grammar. Where text is wanted it needs no quotes, and a list of one no brackets."""
    try:
        document = tomllib.loads(f"value = {text}")
        value = document["value"] if len(document) == 1 else text  # a line break may have begun another key
    except (ValueError, RecursionError):
        if text.startswith(("'", '"', "[")):
            raise
        value = text
    if kind == tuple[str, ...] and not isinstance(value, list):
        return [value if isinstance(value, str) else text]
    if kind == str | tuple[str, ...] and value == text and re.fullmatch(r"\w+", text):
        return [text]  # a module's name, which as an expression would have to be whole
    if kind == tuple[int, ...] and type(value) is int:
        return [value]
    return text if kind is str and not isinstance(value, str) else value


def read_recipe(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The TOML of a file, and what keeps it from being read."""
    try:
        text = read_bytes(path, LONGEST).decode("utf-8-sig")
        if any(key.count(".") > DEEPEST for line in text.split("\n") for key in line.split("=")[:-1]):
            raise ValueError(f"a key of more than {DEEPEST} parts")  # each part costs the parser all those before it
        return tomllib.loads(text), []
    except UserError as error:
        return {}, [(str(path), f"this recipe cannot be read ({error}); a key is set as key.path=value")]
    except UnicodeDecodeError as error:
        problem = f"this recipe is not UTF-8 text (byte {error.start})"
    except (ValueError, RecursionError) as error:
        problem = f"this recipe is not TOML: {error}"
    return {}, [(str(path), problem)]


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (key.path, value) pairs of nested tables."""
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and value and key not in knobs() and prefix.count(".") < 3:
            yield from flat(value, f"{key}.")
        else:
            yield key, value


def assemble(values: dict[str, Any]) -> Config:
    """The Config with these values, by key path."""
    made = {
        name: kind(**{f.name: values[f"{name}.{f.name}"] for f in fields(kind) if f"{name}.{f.name}" in values})
        for name, kind in sections().items()
    }
    return Config(**made, **{key: value for key, value in values.items() if "." not in key})
