"""A conversation in its tokenizer's own chat template, as transformers writes it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from minitune.data.examples import Chat, Example, Turn
from minitune.data.objects import RowError
from minitune.data.sandbox import MARKS, ChatTemplate, short
from minitune.errors import UserError
from minitune.tokenizer import Tokenizer


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


def reads(source: str) -> frozenset[str]:
    """The names that a chat template speaks of: variables, attributes, keys."""
    return compiled(source).names


def render(source: str, variables: Mapping[str, Any], views: Sequence[View]) -> list[str]:
    """Run a chat template once for each view of the messages in `variables`."""
    template = compiled(source)
    try:
        return [template.render(**variables_of(view, variables)) for view in views]
    except UserError:
        raise
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise RowError(f"the tokenizer's chat template refuses it: {short(str(error))}") from None


def variables_of(view: View, variables: Mapping[str, Any]) -> dict[str, Any]:
    shown = {"messages": variables["messages"][: view.turns], "add_generation_prompt": view.ask}
    return {**variables, **shown, **(MARKS if view.marked else {})}


@lru_cache(maxsize=8)
def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source)
