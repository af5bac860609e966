"""A conversation in its tokenizer's own chat template, as transformers writes it."""

import json
from functools import lru_cache

from minitune.data.formats import Chat, Example, RowError
from minitune.data.sandbox import ChatTemplate, short
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
    except UserError:
        raise
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise RowError(f"the tokenizer's chat template refuses it: {short(str(error))}") from None


def shows_tools(example: Example, tokenizer: Tokenizer) -> bool:
    """False where a chat lists tools and the chat template does not write them."""
    if not (isinstance(example, Chat) and example.tools and tokenizer.chat_template):
        return True
    return "tools" in compiled(tokenizer.chat_template).variables


@lru_cache(maxsize=8)
def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source)
