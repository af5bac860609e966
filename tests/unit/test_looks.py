"""What makes a row worth a look: each reason with a row that has it, and the nearest one that has not."""

import unicodedata

import pytest

from minitune.data.examples import Chat, Completion, Instruction, Text, Turn
from minitune.data.looks import WORDS, Look, answer_key, evidence, exchanges, look, visible


def asked(answer: str, prompt: str = "What is it?") -> Instruction:
    return Instruction(prompt, "", answer)


@pytest.mark.parametrize(
    ("flag", "has", "has_not"),
    [
        (Look.TINY_ANSWER, asked(" 42\n"), asked("420")),
        (Look.ECHO, asked("What is it? "), asked("What is it not?")),
        (Look.ECHO, Instruction("Say", "this", "Say\nthis"), Instruction("Say", "this", "this")),
        (Look.ECHO, Completion("a b c", "a b c"), Text("a b c")),
        (Look.REFUSAL, asked("I'm sorry, but I can't help with that."), asked("She said: I'm sorry.")),
        (Look.REFUSAL, asked("Well, as an AI language model, I have none."), asked("As an aid, take a map.")),
        (Look.REFUSAL, asked("很抱歉我不知道。"), asked("他说很抱歉。")),
        (Look.REPLACED, asked("caf\ufffd is open"), asked("café is open")),
        (Look.GARBLED, asked("cafÃ© is open"), asked("SÃO PAULO, café")),
        (Look.GARBLED, asked("itâ€™s open"), asked("it\u2019s open")),
        (Look.HIDDEN, asked("red\x1b[31m text"), asked("red\ttext\r\nhere")),
        (Look.HIDDEN, asked("abc\u202etxt.exe"), asked("עברית and ไทย")),
        (Look.HIDDEN, Instruction("zero\u200bwidth", "", "none here"), asked("👩\u200d🚀 flies")),
        (Look.FENCE, asked("```python\nprint(1)\n"), asked("```python\nprint(1)\n```")),
        (Look.FENCE, asked("see\n~~~\nx"), asked("the mark ``` opens code")),
    ],
)
def test_each_reason(flag: Look, has: Instruction, has_not: Instruction) -> None:
    assert look(has) & flag and not look(has_not) & flag
    assert flag in WORDS and evidence(has, flag).strip()


def test_a_chat_is_looked_at_turn_by_turn() -> None:
    def chat(*texts: str, trained: bool = True) -> Chat:
        roles = ("user", "assistant") * len(texts)
        return Chat(tuple(Turn(role, text, role == "assistant" and trained) for role, text in zip(roles, texts)))  # noqa: B905

    fine = chat("Who is it?", "It is Ann.", "And who?", "Ben.")
    assert look(fine) == 0 and list(exchanges(fine)) == [("Who is it?", "It is Ann."), ("And who?", "Ben.")]
    assert look(chat("Who is it?", "It is Ann.", "And who?", "And who?")) == Look.ECHO
    assert look(chat("Who is it?", "It is Ann.", "And who?", "And who?", trained=False)) == 0  # not learned
    call = Chat((Turn("user", "Call it.", False), Turn("assistant", "", True, more='{"tool_calls": []}')))
    assert look(call) == 0 and list(exchanges(call)) == [("Call it.", '{"tool_calls": []}')]
    assert look(Instruction("And who?", "", "Ben.", history=(("Who?", "Who?"),))) == Look.ECHO


def test_answers_are_equal_but_for_case_and_white_space() -> None:
    assert answer_key(asked("I do not  know.\n")) == answer_key(asked("i do not know.", "Another question"))
    assert answer_key(asked("I do not know.")) != answer_key(asked("I do know."))
    assert 0 <= answer_key(asked("x")) < 2**64


def test_visible_leaves_nothing_that_is_obeyed_or_unseen() -> None:
    everything = "".join(map(chr, [*range(0x110000)]))
    shown = visible(everything)
    left = {character for character in shown if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")}
    allowed = {"\t", "\n", "\u200c", "\u200d"}  # joiners: emoji and Indic scripts are written with them
    formats = {c for c in left - allowed if unicodedata.category(c) == "Cf"}
    assert left - allowed == formats  # marks of a script of its own, that shape letters and move nothing
    assert all(unicodedata.bidirectional(c) in ("AN", "BN", "NSM", "L", "AL") for c in formats)
    assert not {"\x1b", "\r", "\x9b", "\x7f", "\u202e", "\u2066", "\u200b", "\ufeff", "\U000e0041"} & set(shown)
    assert visible("a\x1b[2Jb\u202ec") == "a\\u{1b}[2Jb\\u{202e}c" and visible("plain é 中\n") == "plain é 中\n"


def test_the_evidence_is_what_was_seen() -> None:
    far = asked("x " * 500 + "caf\ufffd" + " y" * 500)
    assert "caf\ufffd" in evidence(far, Look.REPLACED) and len(evidence(far, Look.REPLACED)) < 200
    assert evidence(Instruction("a\x00b", "", "fine"), Look.HIDDEN) == "a\x00b"
    assert evidence(asked("```\nopen"), Look.FENCE) == "```\nopen"
