"""A tokenizer's own chat template: a Jinja program out of a model folder, run in a sandbox as transformers runs it."""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minitune.data.formats import Chat, Example, RowError
from minitune.errors import UserError
from minitune.tokenizer import Tokenizer


def rendered(chat: Chat, turns: int, ask: bool, tokenizer: Tokenizer) -> str:
    """The first turns of a chat as its model reads them; with `ask`, up to where the next answer begins."""
    if tokenizer.chat_template is None:
        raise UserError('the tokenizer has no chat template for conversations; set data.template = "alpaca"')
    template = compiled(tokenizer.chat_template)
    try:
        return template.render(
            messages=[{"role": turn.role, "content": turn.text} for turn in chat.turns[:turns]],
            tools=json.loads(chat.tools) if chat.tools else None,
            documents=None,
            add_generation_prompt=ask,
            **tokenizer.special_tokens,
        )
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise RowError(f"the tokenizer's chat template refuses it: {error}") from None


def shows_tools(example: Example, tokenizer: Tokenizer) -> bool:
    """False where a chat lists tools and the chat template does not write them."""
    if not (isinstance(example, Chat) and example.tools and tokenizer.chat_template):
        return True
    return "tools" in names_in(tokenizer.chat_template)


@lru_cache(maxsize=8)
def names_in(source: str) -> set[str]:
    """The variables that a chat template asks for."""
    return jinja2.meta.find_undeclared_variables(compiled(source).environment.parse(source))


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
    """{% generation %} ... {% endgeneration %}: marks answers for others; here, only what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


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
