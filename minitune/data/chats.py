"""A conversation in its tokenizer's own chat template -> the texts that are trained on, and the answers in them.

An answer is what the template writes between the prompt that asks for it and the turn after it, the end of its turn
included; or, where the template marks what is generated, what it marks there. A template that writes earlier turns
otherwise once others follow (that leaves out old thoughts, say) makes several texts of one conversation, so that each
answer stands behind the very prompt that inference would give.
"""

import json
import re
from functools import lru_cache

from minitune.data.chat_template import View, marks_answers, named, rendered
from minitune.data.encoding import Answer, Script
from minitune.data.examples import Chat, Turn
from minitune.data.objects import RowError
from minitune.data.sandbox import MARKS, to_json
from minitune.secrets import shortened
from minitune.tokenizer import Tokenizer

OPENS, CLOSES = MARKS.values()


def scripts(chat: Chat, tokenizer: Tokenizer) -> list[Script]:
    """The texts of a conversation, in order; each answer that is to be learned is in one of them.

    Raises:
        RowError: the template refuses it, leaves something out, or does not begin an answer as it asks for it.
        UserError: there is no chat template.
    """
    by_marks = tokenizer.chat_template is not None and marks_answers(tokenizer.chat_template)
    learned = [number for number, turn in enumerate(chat.turns) if turn.train]
    whole = View(len(chat.turns))
    asked = {number: View(number, ask=True) for number in learned}
    answered = {number: View(number + 1, marked=by_marks) for number in learned}
    views = rendered(chat, [whole, *asked.values(), *answered.values()], tokenizer)
    refuse_left_out(chat, views[whole])

    found: list[Script] = []
    text, answers = "", []  # the text so far, and the answers in it
    for number in learned:
        turn, prompt, upto = chat.turns[number], views[asked[number]], views[answered[number]]
        upto, answer = (marked_answer if by_marks else plain_answer)(prompt, upto, named(turn, number), tokenizer)
        if answer is None:
            continue
        kept = as_in(prompt, text, answers, tokenizer)
        if kept is None:  # what was written before is written otherwise by now
            found.append(finished(text, answers, tokenizer))
        refuse_partly_shown(turn, upto[answers_end(kept) :], named(turn, number))
        text, answers = upto, [*(kept or []), answer]
    kept = as_in(views[whole], text, answers, tokenizer)
    if kept is None:  # all turns together hold no answer to be learned
        found.append(finished(text, answers, tokenizer))
    return [*found, finished(views[whole], kept or [], tokenizer)]


def as_in(later: str, text: str, answers: list[Answer], tokenizer: Tokenizer) -> list[Answer] | None:
    """The answers of a text where a later text begins with them, too; None where it writes them otherwise.

    A text may be closed once more after its last answer; where the later text goes on without that, it is no part of
    the answer.
    """
    end = answers_end(answers)
    if later[:end] == text[:end]:
        return answers
    *before, last = answers
    start, _ = last.spans[-1]
    for closer in closers(tokenizer):
        once = text[:end].removesuffix(closer).rstrip()
        if start < len(once) < end and once.endswith(closers(tokenizer)) and later.startswith(once):
            return [*before, Answer(last.asked, (*last.spans[:-1], (start, len(once))))]
    return None


def answers_end(answers: list[Answer] | None) -> int:
    """Where the last answer ends."""
    return answers[-1].spans[-1][1] if answers else 0


def finished(text: str, answers: list[Answer], tokenizer: Tokenizer) -> Script:
    """A text that ends with an answer: closed as the template closes it, else by eos."""
    bare = text.rstrip()
    if bare.endswith(closers(tokenizer)):
        return Script(text, tuple(answers))
    return Script(bare, tuple(answers), ends=True)


@lru_cache(maxsize=8)
def closers(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens that can close an answer: those that are no text, and those that stop generation."""
    added = tokenizer.engine.get_added_tokens_decoder().values()
    stops = (tokenizer.engine.id_to_token(id) for id in tokenizer.stop_ids)
    return (*(token.content for token in added if token.special), *(token for token in stops if token))


# ---- where an answer is --------------------------------------------------------------------------------------------


def plain_answer(prompt: str, upto: str, name: str, tokenizer: Tokenizer) -> tuple[str, Answer | None]:
    """All after the prompt but the white space at its end, which belongs to what follows."""
    refuse_other_beginning(prompt, upto, name)
    end = len(upto.rstrip())
    if end <= len(prompt):
        raise RowError("is left out by the chat template", name)
    return upto, Answer(len(prompt), ((len(prompt), end),))


def marked_answer(prompt: str, upto: str, name: str, tokenizer: Tokenizer) -> tuple[str, Answer | None]:
    """What the template marks as generated, less what it writes already in asking; None where it marks nothing."""
    upto, marks = without_marks(upto)
    refuse_other_beginning(prompt, upto, name)
    spans = [(max(start, len(prompt)), stop) for start, stop in marks if stop > len(prompt)]
    if not spans:
        return upto, None
    rest = upto[spans[-1][1] :].strip()
    if rest in closers(tokenizer):  # unmarked, it would never be learned, and the model would never stop
        spans[-1] = (spans[-1][0], len(upto.rstrip()))
    elif rest:
        raise RowError(f"goes on after what the chat template marks as generated, with {shortened(rest, 40)!r}", name)
    return upto, Answer(len(prompt), tuple(spans))


def without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without MARKS, and the stretches that stood between them."""
    plain, spans, length, start = [], [], 0, 0
    for part in re.split(f"({OPENS}|{CLOSES})", text):
        if part == OPENS:
            start = length
        elif part == CLOSES:
            spans.append((start, length))
        else:
            plain.append(part)
            length += len(part)
    return "".join(plain), spans


def refuse_other_beginning(prompt: str, upto: str, name: str) -> None:
    if not upto.startswith(prompt):
        raise RowError("is not begun by the chat template as it asks for it", name)


# ---- what a template leaves out ------------------------------------------------------------------------------------


def refuse_left_out(chat: Chat, text: str) -> None:
    """Refuse a chat of which the template does not show what was said to the assistant."""
    for number, turn in enumerate(chat.turns):
        if turn.role != "assistant" and not shows(text, turn.text):
            raise RowError(f"is left out by the chat template ({turn.role})", named(turn, number))


def refuse_partly_shown(turn: Turn, text: str, name: str) -> None:
    """Refuse an answer of which the template writes a part only: without its thoughts, or without a call."""
    more = json.loads(turn.more) if turn.more else {}
    calls = [call["function"]["name"] for call in more.get("tool_calls", ())]
    for said in (turn.text, more.get("reasoning_content", ""), *calls):
        if not shows(text, said):
            raise RowError(f"is left out in part by the chat template: {shortened(said.strip(), 40)!r}", name)


def shows(text: str, said: str) -> bool:
    """Whether a text holds what was said, but for white space, or as JSON."""
    said = said.strip()
    if said in text or to_json(said)[1:-1] in text:
        return True
    return "".join(said.split()) in "".join(text.split())
