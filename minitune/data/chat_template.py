"""A tokenizer's own chat template: a Jinja program out of a model folder, run in a sandbox as transformers runs it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minitune.data.examples import Chat, Example, Turn
from minitune.data.readers import RowError
from minitune.errors import UserError
from minitune.tokenizer import Tokenizer

MARKS = {"generation_opens": "\0<", "generation_closes": "\0>"}  # no text of a row holds a NUL


class View(NamedTuple):
    """One way to render a conversation."""

    turns: int  # how many of its turns, from the first
    ask: bool = False  # go on to where the next answer begins
    marked: bool = False  # with MARKS around what the template marks as generated


def rendered(chat: Chat, views: Iterable[View], tokenizer: Tokenizer) -> dict[View, str]:
    """A chat as its model reads it, in each of some views.

    Raises:
        RowError: the template raises, or has no place for what a turn says.
        UserError: the tokenizer has no chat template, or one that is not Jinja.
    """
    if tokenizer.chat_template is None:
        raise UserError('the tokenizer has no chat template for conversations; set data.template = "alpaca"')
    variables = {
        "messages": [message(turn, number, tokenizer.chat_template) for number, turn in enumerate(chat.turns)],
        "tools": json.loads(chat.tools) if chat.tools else None,
        "documents": None,
        **tokenizer.special_tokens,
    }
    wanted = list(dict.fromkeys(views))
    return dict(zip(wanted, render(tokenizer.chat_template, variables, wanted), strict=True))


def message(turn: Turn, number: int, template: str) -> dict[str, Any]:
    """A turn as chat templates are given it, refused where this one has no place for what it says."""
    said: dict[str, Any] = json.loads(turn.more) if turn.more else {}
    for key in ("tool_calls", "reasoning_content"):
        if key in said and not reads(template).intersection(ALSO_READ.get(key, (key,))):
            if key == "tool_calls" and turn.written:
                return {"role": turn.role, "content": turn.written}
            raise RowError(
                f"is not shown by the tokenizer's chat template, which does not know {key}",
                f"{named(turn, number)}.{key}",
            )
    if "reasoning_content" in said:
        said["thinking"] = said["reasoning_content"]
    if turn.text or "tool_calls" not in said:
        said["content"] = turn.text
    return {"role": turn.role, **said}


ALSO_READ = {"reasoning_content": ("reasoning_content", "thinking")}  # as transformers gives it, under both names


def named(turn: Turn, number: int) -> str:
    """How to speak of a turn: by its key in the row."""
    return turn.place or f"turn {number + 1}"


def shows_tools(example: Example, tokenizer: Tokenizer) -> bool:
    """False where a chat lists tools and the chat template does not write them."""
    if not (isinstance(example, Chat) and example.tools and tokenizer.chat_template):
        return True
    return "tools" in reads(tokenizer.chat_template)


def marks_answers(source: str) -> bool:
    """Whether a chat template says itself what is generated, by {% generation %}."""
    return "generation_opens" in reads(source)


@lru_cache(maxsize=8)
def reads(source: str) -> frozenset[str]:
    """The names that a chat template speaks of: variables, attributes, keys."""
    tree = compiled(source).environment.parse(source)
    attributes = (node.attr for node in tree.find_all(nodes.Getattr))
    keys = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    return frozenset([*jinja2.meta.find_undeclared_variables(tree), *attributes, *keys])


# ---- the one place where a template runs ---------------------------------------------------------------------------


def render(source: str, variables: Mapping[str, Any], views: Sequence[View]) -> list[str]:
    """Run a chat template once for each view of the messages in `variables`."""
    template = compiled(source)
    try:
        return [template.render(**variables_of(view, variables)) for view in views]
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise RowError(f"the tokenizer's chat template refuses it: {error}") from None


def variables_of(view: View, variables: Mapping[str, Any]) -> dict[str, Any]:
    shown = {"messages": variables["messages"][: view.turns], "add_generation_prompt": view.ask}
    return {**variables, **shown, **(MARKS if view.marked else {})}


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """A chat template in a sandbox, with what transformers offers to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the tokenizer's chat template has an error in line {error.lineno}: {error.message}") from None


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: what is inside, between MARKS where a view asks for them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opens, closes = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in MARKS)
        return nodes.Scope([opens, *inside, closes], lineno=line)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
