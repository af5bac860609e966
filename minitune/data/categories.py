"""What a row is counted under, for a person to see what a file is made of."""

import json
import re
import unicodedata
from typing import Any

from minitune.data.examples import Chat, Completion, Example, Instruction, Text
from minitune.data.objects import Row

NONE, EMPTY = "(none)", "(empty)"

# Scripts that put no spaces between words, and about how many of their letters make one:
CHINESE_AND_JAPANESE, TWO = (
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff",
    2,
)
THAI_LAO_BURMESE_KHMER, FOUR = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff", 4
MARKS = "".join(c for c in map(chr, range(0x3100)) if unicodedata.category(c)[0] == "M")  # they stay with their letter
WORD = re.compile(
    rf"(?P<unspaced>(?:[{CHINESE_AND_JAPANESE}][{MARKS}]*){{1,{TWO}}}"
    rf"|(?:[{THAI_LAO_BURMESE_KHMER}][{MARKS}]*){{1,{FOUR}}})"
    rf"|[^\s{CHINESE_AND_JAPANESE}{THAI_LAO_BURMESE_KHMER}]+"
)


def category_of(row: Row, example: Example, column: str) -> str:
    """What a row is counted under: the value of a column of its own, else how it begins."""
    if column:
        return value_in_words(row.get(column))
    return first_words(beginning(example)[:200]).lower()[:60] or EMPTY


def value_in_words(value: Any) -> str:
    """A value of a column, as JSON writes it where it is no text."""
    if value is None:
        return NONE
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return written[:60].encode(errors="backslashreplace").decode() if written.strip() else EMPTY


def first_words(text: str) -> str:
    """The first two words of a text; fewer, where one is of a script without spaces, which is cut by its length."""
    begin = end = 0
    for number, word in enumerate(WORD.finditer(text)):
        begin, end = (word.start() if number == 0 else begin), word.end()
        if number == 1 or word["unspaced"]:
            break
    return " ".join(text[begin:end].split())


def beginning(example: Example) -> str:
    match example:
        case Instruction(instruction=text) | Completion(prompt=text) | Text(text=text):
            return text
        case Chat(turns=turns):
            return next((turn.text for turn in turns if turn.role == "user"), "")
