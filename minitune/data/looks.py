"""What makes a row worth a human look: seen in its text while it is tokenised, kept as one bit each.

None of it is a fault for certain, and no row is left out for it.
"""

import hashlib
import re
from collections.abc import Iterator
from enum import IntFlag

from minitune.data.examples import Chat, Completion, Example, Instruction, Text, texts
from minitune.secrets import shortened


class Look(IntFlag):
    """Reasons to look at a row that follow from its text alone."""

    TINY_ANSWER = 1
    ECHO = 2
    REFUSAL = 4
    REPLACED = 8
    GARBLED = 16
    HIDDEN = 32
    FENCE = 64


WORDS = {
    Look.TINY_ANSWER: "an answer of one or two characters",
    Look.ECHO: "the answer is the prompt again",
    Look.REFUSAL: "the answer refuses, or speaks of itself as a model",
    Look.REPLACED: "U+FFFD, left by text that was decoded wrongly",
    Look.GARBLED: "UTF-8 that was read as Latin-1, such as \u00c3\u00a9 for \u00e9",
    Look.HIDDEN: "characters that nobody sees: control, zero-width or direction marks",
    Look.FENCE: "a code fence that is opened and not closed",
}
TINY = 2  # characters

REFUSES = re.compile(  # at the beginning of an answer, in lower case
    r"(i'?m (very |really |so )?sorry\b|sorry, (but )?i\b|i (can(no|')t|can not|am unable to|am not able to|won'?t)\b"
    r"|i apologi[sz]e\b|作为一个?(人工智能|ai|语言模型)|很?抱歉|对不起)"
)
SPEAKS_OF_ITSELF = re.compile(r"\b(as an ai|as a (large )?language model|i('| a)m an ai)\b")
GARBLED = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac[\u2018-\u201d\u2122\u0153\u00a6]|\u00ef\u00bb\u00bf")
REPLACED = re.compile("\ufffd")
HIDDEN_ASCII = re.compile("[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f]")
HIDDEN = re.compile(  # C0 but for tab and line ends, C1, soft hyphen, zero width, direction, tags, private use
    "[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f\U000f0000-\U0010ffff]"
)
UNSEEN = re.compile(f"[{HIDDEN.pattern[1:-1]}\r\ud800-\udfff]")  # and what would move a cursor, or is no character
FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)


def look(example: Example) -> int:
    """The bits of `Look` that hold of an example."""
    found = Look(0)
    for prompt, answer in exchanges(example):
        said = answer.strip()
        if len(said) <= TINY:
            found |= Look.TINY_ANSWER
        if prompt and said == prompt.strip():
            found |= Look.ECHO
        if ("```" in answer or "~~~" in answer) and len(FENCE.findall(answer)) % 2:
            found |= Look.FENCE
        begins = said[:200].lower()
        if not isinstance(example, Text) and (REFUSES.match(begins) or SPEAKS_OF_ITSELF.search(begins)):
            found |= Look.REFUSAL
    for text in texts(example):
        if text.isascii():
            found |= Look.HIDDEN if HIDDEN_ASCII.search(text) else 0
            continue
        found |= Look.HIDDEN if HIDDEN.search(text) else 0
        found |= Look.GARBLED if GARBLED.search(text) else 0
        found |= Look.REPLACED if REPLACED.search(text) else 0
    return int(found)


def answer_key(example: Example) -> int:
    """64 bits of what is answered, case and white space aside: equal where rows answer the same."""
    said = "\0".join(" ".join(answer.lower().split()) for _, answer in exchanges(example))
    return int.from_bytes(hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def exchanges(example: Example) -> Iterator[tuple[str, str]]:
    """Each answer that is learned, and what it answers; raw text is one answer to nothing."""
    match example:
        case Text(text=text):
            yield "", text
        case Completion(prompt=prompt, completion=completion):
            yield prompt, completion
        case Instruction(instruction=instruction, input=input_, output=output, history=history):
            yield from history
            yield f"{instruction}\n{input_}".strip(), output
        case Chat(turns=turns):
            asked = ""
            for turn in turns:
                text = turn.text or turn.more  # an answer may be a tool call alone
                if turn.train:
                    yield asked, text
                asked = text


def evidence(example: Example, flag: int) -> str:
    """Where in an example a reason is to be seen: the text around it, or how the last answer begins."""
    pattern = {Look.REPLACED: REPLACED, Look.GARBLED: GARBLED, Look.HIDDEN: HIDDEN}.get(flag)
    for text in texts(example) if pattern else ():
        if found := pattern.search(text):
            return text[max(0, found.start() - 60) : found.end() + 60]
    answers = [answer for _, answer in exchanges(example)]
    return shortened(answers[-1], 200) if answers else ""


def visible(text: str) -> str:
    """The text with every character that nobody sees, or that a terminal obeys, written out as its code point: so a
    row can neither hide anything nor paint over what is around it."""
    return UNSEEN.sub(lambda found: f"\\u{{{ord(found[0]):x}}}", text)
