"""Rows -> examples: what each format reads, where each bad row stands, and that no line is cut in the wrong place."""

import json
import pickle
from datetime import datetime
from pathlib import Path

import pytest

from minitune.data import formats
from minitune.data.examples import Chat, Completion, Example, Instruction, Text, Turn, as_chat, texts
from minitune.data.formats import BadRow, locate, parse, read, settle
from minitune.data.objects import RowError
from minitune.errors import UserError

DATA = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")


def write(folder: Path, name: str, content: bytes | str | list) -> Path:
    """A file of bytes, of text, or of rows (as the suffix asks for)."""
    path = folder / name
    if isinstance(content, list):
        content = json.dumps(content) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def one(folder: Path, row: dict, **options: object) -> Example | BadRow:
    """What a single row is read as."""
    [example] = read(write(folder, "one.json", [row]), **options)
    return example


def user(text: str) -> Turn:
    return Turn("user", text, False)


def assistant(text: str, train: bool = True) -> Turn:
    return Turn("assistant", text, train)


def calls(written: str) -> Turn:
    """ShareGPT's function_call: what it writes, and the same as chat templates know it."""
    more = f'{{"tool_calls": [{{"type": "function", "function": {written}}}]}}'
    return Turn("assistant", "", True, more, written)


def says(role: str, content: object, **more: object) -> dict:
    return {"role": role, "content": content, **more}


CALLED = {"name": "add", "arguments": {"a": 2}}
ASK = says("user", "2+2?")
ANSWER = says("assistant", "4")


# ---- formats


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, Instruction("Add.", "2 2", "4")),
        (
            {"instruction": "Add.", "output": "4", "text": "### Instruction:\nAdd.\n\n### Response:\n4"},
            Instruction("Add.", "", "4"),
        ),
        ({"instruction": "Add.", "input": None, "output": " 4\n"}, Instruction("Add.", "", " 4\n")),
        ({"prompt": "2+2=", "completion": "4"}, Completion("2+2=", "4")),
        ({"text": "four"}, Text("four")),
        ({"messages": [ASK, ANSWER]}, Chat((user("2+2?"), assistant("4")))),
        (
            {
                "messages": [
                    says("system", "Be brief."),
                    ASK,
                    ANSWER | {"train": False},
                    ASK,
                    ANSWER | {"loss_weight": 1},
                ]
            },
            Chat(
                (Turn("system", "Be brief.", False), user("2+2?"), assistant("4", False), user("2+2?"), assistant("4"))
            ),
        ),
        (
            {"messages": [says("user", [{"type": "text", "text": "2"}, {"type": "text", "value": "+2?"}]), ANSWER]},
            Chat((user("2+2?"), assistant("4"))),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "2+2?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                    {"from": "observation", "value": "4"},
                    {"from": "gpt", "value": "Four."},
                ],
                "system": "Be brief.",
                "tools": '[{"name": "add é"}]',
            },
            Chat(
                (
                    Turn("system", "Be brief.", False),
                    user("2+2?"),
                    calls('{"name": "add", "arguments": {"a": 2}}'),
                    Turn("tool", "4", False),
                    assistant("Four."),
                ),
                '[{"name": "add é"}]',
            ),
        ),
        (
            {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}], "tools": "[]"},
            Chat((user("a"), assistant("b"))),
        ),
    ],
)
def test_formats_are_found_by_their_columns(tmp_path, row, example):
    assert one(tmp_path, row) == example


def test_columns_are_renamed(tmp_path):
    row = {"question": "2+2?", "answer": "4", "instruction": "not this one"}
    assert one(tmp_path, row, columns={"question": "instruction", "answer": "output"}) == Instruction("2+2?", "", "4")


def test_wrong_columns_are_named_with_those_that_are_there(tmp_path):
    row = {"question": "2+2?", "answer": "4"}
    with pytest.raises(UserError, match=r"names reply, but its columns are question, answer"):
        one(tmp_path, row, columns={"question": "instruction", "reply": "output"})
    with pytest.raises(UserError, match=r"data.columns.answer: 'outptu' is no column of any format"):
        one(tmp_path, row, columns={"answer": "outptu"})
    with pytest.raises(UserError, match=r"columns \(question, answer\) fit no format .*alpaca: instruction \+ output"):
        one(tmp_path, row)


def test_auto_takes_the_first_row_and_holds_the_others_to_it(tmp_path):
    path = write(tmp_path, "mixed.jsonl", [{"text": "a"}, {"prompt": "p", "completion": "c"}, {"text": "b"}])
    first, other, last = read(path)
    assert (first, last) == (Text("a"), Text("b"))
    assert str(other) == f"{path}:2: text is missing; there is prompt, completion"


# ---- what a message says beside its text


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize(
    ("message", "more"),
    [
        ({"content": None, "tool_calls": [CALL]}, {"tool_calls": [CALL]}),
        ({"tool_calls": [CALL | {"id": "c1", "index": 0}]}, {"tool_calls": [{"id": "c1", **CALL}]}),
        ({"tool_calls": [{"function": {"name": "add", "arguments": ' {"a": 2}'}}]}, {"tool_calls": [CALL]}),
        ({"tool_calls": [{"name": "add", "arguments": {"a": 2}}]}, {"tool_calls": [CALL]}),
        ({"function_call": {"name": "add", "arguments": '{"a": 2}'}, "tool_calls": []}, {"tool_calls": [CALL]}),
        ({"content": "", "tool_calls": [CALL, CALL]}, {"tool_calls": [CALL, CALL]}),
        ({"content": "4", "reasoning_content": "2+2"}, {"reasoning_content": "2+2"}),
        ({"content": "4", "thinking": "2+2", "reasoning": "2+2"}, {"reasoning_content": "2+2"}),
        ({"content": "4", "reasoning_content": "", "tool_calls": None, "refusal": None}, {}),
        ({"content": "4", "name": "adder", "id": 7, "timestamp": "now"}, {"name": "adder"}),
    ],
)
def test_what_a_message_says_goes_on_to_the_template(tmp_path, message, more):
    turn = one(tmp_path, {"messages": [ASK, {"role": "assistant"} | message]}).turns[1]
    assert (json.loads(turn.more or "{}"), turn.text) == (more, message.get("content") or "")
    assert turn.train


@pytest.mark.parametrize("role", ["tool", "function"])
def test_results_of_tools_keep_their_names(tmp_path, role):
    result = says(role, [{"type": "text", "text": "4"}], tool_call_id="c1", name="add")
    turns = one(tmp_path, {"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}, result, ANSWER]}).turns
    assert turns[2] == Turn("tool", "4", False, '{"name": "add", "tool_call_id": "c1"}')


@pytest.mark.parametrize("mark", ["train", "loss_weight", "weight"])
@pytest.mark.parametrize(
    ("column", "speaker", "said"), [("messages", "role", "content"), ("conversations", "from", "value")]
)
def test_marks_of_single_turns(tmp_path, mark, column, speaker, said):
    def turn(who: str, **more: object) -> dict:
        return {speaker: who, said: who, **more}

    row = {column: [turn("user", **{mark: 0}), turn("assistant", **{mark: 0.0}), turn("user"), turn("assistant")]}
    assert [turn.train for turn in one(tmp_path, row).turns] == [False, False, False, True]
    row[column][1][mark], row[column][3][mark] = 1, False
    assert [turn.train for turn in one(tmp_path, row).turns] == [False, True, False, False]


def test_an_alpaca_row_with_a_history(tmp_path):
    row = {"instruction": "And 3+3?", "output": "6", "system": "Be brief.", "history": [["2+2?", "4"]]}
    example = one(tmp_path, row)
    assert example == Instruction("And 3+3?", "", "6", "Be brief.", (("2+2?", "4"),))
    assert texts(example) == ["Be brief.", "2+2?", "4", "And 3+3?", "", "6"]
    assert [turn.text for turn in as_chat(example).turns] == ["Be brief.", "2+2?", "4", "And 3+3?", "6"]
    assert [turn.train for turn in as_chat(example).turns] == [False, False, True, False, True]
    assert one(tmp_path, row | {"history": [], "system": ""}) == Instruction("And 3+3?", "", "6")


def test_a_prompt_and_a_completion_of_messages(tmp_path):
    row = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER], "tools": [{"name": "add"}]}
    expected = Chat((user("2+2?"), assistant("4", False), user("2+2?"), assistant("4")), '[{"name": "add"}]')
    example = one(tmp_path, row)
    assert example == expected
    assert [turn.place for turn in example.turns] == ["prompt[0]", "prompt[1]", "prompt[2]", "completion[0]"]
    bad = one(tmp_path, {"prompt": "2+2?", "completion": [ANSWER]})
    assert str(bad.reason) == "prompt is text, not a list"


def test_a_system_column_goes_before_a_conversation(tmp_path):
    for column, turns in (
        ("messages", [ASK, ANSWER]),
        ("conversations", [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]),
    ):
        example = one(tmp_path, {column: turns, "system": "Be brief."})
        assert example == Chat((Turn("system", "Be brief.", False), user("2+2?"), assistant("4")))


def test_a_row_that_is_read_already_is_parsed_as_in_its_file(tmp_path):
    row = {"question": "2+2?", "answer": "4"}
    columns = {"question": "instruction", "answer": "output"}
    path = write(tmp_path, "rows.jsonl", [row])
    assert settle(path, row, "auto", columns) == "alpaca"
    assert settle(path, row, "text") == "text"
    example = parse(row, "alpaca", columns, "rows.jsonl:1")
    assert example == next(read(path, columns=columns))
    assert example.origin == "rows.jsonl:1"
    with pytest.raises(RowError) as error:
        parse({"question": "2+2?", "answer": None}, "alpaca", columns)
    assert (error.value.key, str(error.value)) == ("answer", "answer is null")
    assert pickle.loads(pickle.dumps(error.value)).key == "answer"


def test_the_key_of_a_bad_row_is_the_files_own(tmp_path):
    row = {"chat": [ASK, says("assistant", None)]}
    assert one(tmp_path, row, columns={"chat": "messages"}) == BadRow(
        f"{tmp_path / 'one.json'} row 1", "chat[1].content is null", "chat[1].content"
    )


# ---- bad rows


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Add.", "output": ""}, "output is empty"),
        ({"instruction": "Add.", "output": " \n"}, "output is empty"),
        ({"instruction": "Add.", "output": None}, "output is null"),
        ({"instruction": None, "output": "4"}, "instruction is null"),
        ({"instruction": "Add.", "output": 4}, "output is a number, not text"),
        ({"instruction": "Add.", "output": True}, "output is a truth value, not text"),
        ({"instruction": "Add.", "input": ["2"], "output": "4"}, "input is a list, not text"),
        ({"prompt": {}, "completion": "4"}, "prompt is an object, not text"),
        ({"text": "\ud800"}, "text holds half a surrogate pair"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "messages is text, not a list"),
        ({"messages": [ASK, "4"]}, "messages[1] is text, not an object"),
        ({"messages": [ASK, says("critic", "4")]}, "messages[1].role is 'critic'"),
        ({"messages": [ASK, {"role": "assistant"}]}, "messages[1].content is missing"),
        ({"messages": [ASK, says("assistant", None)]}, "messages[1].content is null"),
        (
            {"messages": [ASK, says("assistant", [{"type": "image_url"}])]},
            "messages[1].content[0] is not a part of type 'text' but 'image_url'",
        ),
        ({"messages": [ASK, says("assistant", "  ")]}, "messages[1].content is empty"),
        ({"messages": [ANSWER]}, "messages[0] is out of order: assistant comes first"),
        ({"messages": [says("tool", "4"), ANSWER]}, "messages[0] is out of order: tool comes first"),
        ({"messages": [ASK, ASK, ANSWER]}, "messages[1] is out of order: user follows user"),
        ({"messages": [ASK, ANSWER, ANSWER]}, "messages[2] is out of order: assistant follows assistant"),
        ({"messages": [ASK, says("system", "s"), ANSWER]}, "messages[1] is out of order: system follows user"),
        ({"messages": [ASK]}, "messages[0] ends the conversation with user"),
        ({"messages": [ASK, ANSWER, ASK]}, "messages[2] ends the conversation with user"),
        ({"messages": [ASK, ANSWER | {"loss_weight": 0.5}]}, "messages[1].loss_weight is true or false (or 1 or 0)"),
        ({"messages": [ASK, ANSWER | {"train": "yes"}]}, "messages[1].train is true or false (or 1 or 0)"),
        ({"messages": [ASK, ANSWER | {"train": [1]}]}, "messages[1].train is true or false (or 1 or 0)"),
        (
            {"messages": [ASK, ANSWER | {"train": True, "loss_weight": 0}]},
            "messages[1].train is true or false (or 1 or 0)",
        ),
        (
            {"messages": [ASK | {"train": True}, ANSWER]},
            "messages[0].train would train on a turn that is not the assistant's",
        ),
        (
            {"messages": [ASK, ANSWER | {"tool_calls": [{}]}]},
            "messages[1].tool_calls[0].name is missing; there is nothing",
        ),
        ({"text": "a\0b"}, "text holds a NUL character, its character 2"),
        ({"instruction": "Add.", "output": "4", "history": "2+2"}, "history is text, not a list"),
        ({"instruction": "Add.", "output": "4", "history": [["2+2?"]]}, "history[0] is not a list of two texts"),
        ({"instruction": "Add.", "output": "4", "history": [["2+2?", ""]]}, "history[0][1] is empty"),
        ({"instruction": "Add.", "output": "4", "history": [[None, "4"]]}, "history[0][0] is null"),
        ({"instruction": "Add.", "output": "4", "tools": [{}]}, "tools has no place in a row of this format"),
        ({"prompt": "2+2=", "completion": "4", "system": "s"}, "system has no place in a row of this format"),
        ({"prompt": "2+2=", "completion": "4", "input": "s"}, "input has no place in a row of this format"),
        ({"text": "2+2=4", "system": "s"}, "system has no place in a row of this format"),
        ({"messages": [ASK, ANSWER | {"tool_call": {"name": "add"}}]}, "messages[1].tool_call says something that no"),
        ({"messages": [ASK, ANSWER | {"refusal": "No."}]}, "messages[1].refusal says something that no part"),
        ({"messages": [ASK, ANSWER], "functions": [{"name": "f"}]}, "functions says something that no part"),
        ({"messages": [ASK | {"tool_calls": [CALLED]}, ANSWER]}, "messages[0].tool_calls stands in a turn of user"),
        (
            {"messages": [ASK, ANSWER | {"thinking": "a", "reasoning": "b"}]},
            "messages[1].thinking says one thing and reasoning another",
        ),
        (
            {"messages": [ASK, ANSWER | {"tool_calls": [CALLED], "function_call": CALLED}]},
            "messages[1].function_call stands beside tool_calls",
        ),
        ({"messages": [ASK, ANSWER | {"tool_calls": "add"}]}, "messages[1].tool_calls is text, not a list"),
        ({"messages": [ASK, ANSWER | {"function_call": "add"}]}, "messages[1].function_call is text, not an object"),
        (
            {"messages": [ASK, ANSWER | {"tool_calls": [{"function": {"name": None, "arguments": {}}}]}]},
            "messages[1].tool_calls[0].function.name is null",
        ),
        (
            {"messages": [ASK, ANSWER | {"tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]},
            "messages[1].tool_calls[0].function.arguments is not valid JSON at column 2",
        ),
        (
            {"messages": [ASK, ANSWER | {"tool_calls": [{"name": "add", "arguments": '{"a": 2, "a": 3}'}]}]},
            "messages[1].tool_calls[0].arguments is JSON in which a is given twice in one object",
        ),
        (
            {"messages": [ASK, ANSWER | {"tool_calls": [{"function": {"name": "add", "arguments": "[2]"}}]}]},
            "messages[1].tool_calls[0].function.arguments is a list, not an object",
        ),
        (
            {"messages": [ASK, ANSWER | {"tool_calls": [{"name": "add", "arguments": {"a": [{"b": "\0"}]}}]}]},
            "messages[1].tool_calls[0].arguments.a[0].b holds a NUL character",
        ),
        (
            {"messages": [ASK, ANSWER | {"tool_calls": [{"type": "web", "function": CALLED}]}]},
            "messages[1].tool_calls[0].type is 'web'; only functions can be called",
        ),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "function_call", "value": "add"}]},
            "conversations[1].value is not valid JSON at column 1: Expecting value; a call that is to stand as it is",
        ),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "function_call", "value": "[]"}]},
            "conversations[1].value is not an object with name and arguments",
        ),
        ({"messages": [ASK, ANSWER], "tools": [{"name": "\ud800"}]}, "tools[0].name holds half a surrogate pair"),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "tools is not valid JSON"),
        ({"messages": [ASK, ANSWER], "tools": {"name": "f"}}, "tools is not a list of objects"),
        ({"conversations": [{"from": "bot", "value": "hi"}]}, "conversations[0].from is 'bot'"),
        ({"conversations": [{"from": "human"}]}, "conversations[0].value is missing; there is from"),
        (
            {"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}], "system": "c"},
            "conversations[0] is out of order: system follows system",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(tmp_path, row, reason):
    bad = one(tmp_path, row)
    assert isinstance(bad, BadRow)
    assert bad.origin == f"{tmp_path / 'one.json'} row 1"
    assert bad.reason.startswith(reason)


BAD_LINES = {
    b'{"text": "broken"': "not valid JSON at column 18",
    b'{"text": "\xff"}': "not valid UTF-8 at byte 11",
    b'{"text": "a", "text": "b"}': "text is given twice in one object",
    b'["text"]': "a list, not an object",
    b"4": "a number, not an object",
    b'{"text": ' + b"[" * 100_000: "not readable JSON",
    b'{"text": ' + b"1" * 5000 + b"}": "not readable JSON",
    b'{"txet": "a"}': "text is missing; there is txet",
    b"{}": "text is missing; there is nothing",
}


def test_bad_lines_stand_between_the_good_ones(tmp_path):
    good = [b'{"text": "row %d"}' % number for number in range(len(BAD_LINES) + 1)]
    lines = [good[0]]
    for bad, line in zip(BAD_LINES, good[1:], strict=True):
        lines += [bad, line]
    path = write(tmp_path, "train.jsonl", b"\n".join(lines))
    examples = list(read(path))
    assert [example.text for example in examples[::2]] == [f"row {number}" for number in range(len(good))]
    for number, (bad, reason) in enumerate(zip(examples[1::2], BAD_LINES.values(), strict=True)):
        assert bad.origin == f"{path}:{2 * number + 2}"
        assert bad.reason.startswith(reason)


def test_auto_looks_past_a_first_row_that_cannot_be_read(tmp_path):
    broken, example = read(write(tmp_path, "train.jsonl", b'{"te\n{"text": "a"}'))
    assert (type(broken), example) == (BadRow, Text("a"))


# ---- files

# Everything Python's str.splitlines cuts at, but \n and \r which JSON escapes
LINE_BREAKS = "\u2028\u2029\u0085"


def test_only_a_newline_ends_a_line(tmp_path):
    rows = [{"text": f"one{mark}two"} for mark in LINE_BREAKS]
    plain = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    assert len(plain.decode().splitlines()) == 2 * len(rows)  # the mutant would see other lines
    variants = [
        plain,
        b"\xef\xbb\xbf" + plain,
        plain.replace(b"\n", b"\r\n"),
        plain.replace(b"\n", b"\n\n"),
        plain[:-1],
    ]
    for content in variants:
        examples = list(read(write(tmp_path, "train.jsonl", content)))
        assert examples == [Text(row["text"]) for row in rows]


def test_json_lists_with_and_without_a_byte_order_mark(tmp_path):
    rows = [{"text": "a\u2028b"}, {"text": "c"}]
    plain = json.dumps(rows, ensure_ascii=False, indent=2).encode()
    for content in (plain, b"\xef\xbb\xbf" + plain, plain.replace(b"\n", b"\r\n")):
        path = write(tmp_path, "train.JSON", content)
        examples = list(read(path))
        assert examples == [Text("a\u2028b"), Text("c")]
        assert [example.origin for example in examples] == [f"{path} row 1", f"{path} row 2"]


def test_text_lies_between_blank_lines(tmp_path):
    path = write(tmp_path, "book.txt", "\ufeff\r\none\r\n two\u2028x\r\n \r\n\r\nthree")
    examples = list(read(path))
    assert examples == [Text("one\n two\u2028x"), Text("three")]
    assert [example.origin for example in examples] == [f"{path}:2", f"{path}:6"]


def test_text_without_blank_lines_inside_is_one_document_a_line(tmp_path):
    assert list(read(write(tmp_path, "lines.txt", "\none\ntwo\r\nthree\n\n"))) == [
        Text("one"),
        Text("two"),
        Text("three"),
    ]


def test_text_that_is_no_utf8_is_a_bad_row(tmp_path):
    first, bad, last = read(write(tmp_path, "book.txt", b"one\n\ntw\xe9\n\nthree"))
    assert (first, last) == (Text("one"), Text("three"))
    assert str(bad) == f"{tmp_path / 'book.txt'}:3: not valid UTF-8 at byte 3"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"a,b", r"rows are read from .json, .jsonl, .txt, .parquet files, by the suffix"),
        ("rows.json", b'{"text": "a"}', r"holds an object, not a list of objects"),
        ("rows.json", b'{"text": "a"}\n{"text": "b"}', r"holds an object, .*is named .jsonl"),
        ("rows.json", b'[{"text": "a"}, {"text"', r"its list is not closed; it ends in row 2"),
        ("rows.json", b'[{"text": "a"}]\n[]', r"something follows its list"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as error:
        list(read(path))
    assert str(path) in str(error.value)


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path / "folder.jsonl"):
        (tmp_path / "folder.jsonl").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=path.name):
            list(read(path))


def test_the_built_in_set_is_called_tiny():
    examples = list(read(locate("tiny")))
    assert len(examples) > 100
    assert all(isinstance(example, Instruction) for example in examples)


# ---- names that another format reads

SAID = {
    "alpaca": {"instruction": "Add.", "output": "4"},
    "prompt_completion": {"prompt": "2+2=", "completion": "4"},
    "messages": {"messages": [ASK, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "text": {"text": "2+2=4"},
}
LISTS = ("messages", "conversations", "history", "tools")


@pytest.mark.parametrize("format", SAID)
@pytest.mark.parametrize("name", formats.COLUMNS)
def test_what_a_format_does_not_read_is_refused_by_its_key(monkeypatch, format, name):
    """Every column of every other format, where it says something; a copy and an empty column say nothing."""
    if name in formats.NEEDED[format] | formats.MORE[format]:
        return
    row, value = SAID[format], [{"what": "else"}] if name in LISTS else "something else"
    plain = parse(row, format)
    with pytest.raises(RowError, match="has no place in a row of this format") as error:
        parse(row | {name: value}, format)
    assert error.value.key == name
    for nothing in (None, "", " \n", [], {}):
        assert parse(row | {name: nothing}, format) == plain
    if name not in LISTS:
        first, *_, answer = [text for text in texts(plain) if text] * 2
        for copy in (first, f" {first}\n", f"### Asked: {first}\n### Answered:", f"{first} -> {answer}"):
            assert parse(row | {name: copy}, format) == plain
    monkeypatch.setitem(formats.OTHERS, format, frozenset())  # the mutant: what was done where no list named it
    assert parse(row | {name: value}, format) == plain


def test_the_key_that_is_refused_is_the_files_own(tmp_path):
    row = {"question": "2+2?", "answer": "4", "chat": [ASK, ANSWER]}
    columns = {"question": "prompt", "answer": "completion", "chat": "history"}
    bad = one(tmp_path, row, columns=columns)
    assert bad.key == "chat" and bad.reason.startswith("chat has no place")


# ---- the real sets


@real_data
@pytest.mark.parametrize(
    ("name", "columns", "kind", "number"),
    [
        ("alpaca_en_demo.json", {}, Instruction, 999),
        ("alpaca_zh_demo.json", {}, Instruction, 1000),
        ("gpteacher_roleplay_alpaca.json", {}, Instruction, 3146),
        ("gsm8k_train.jsonl", {"question": "instruction", "answer": "output"}, Instruction, 7473),
        ("gsm8k_test.jsonl", {"question": "prompt", "answer": "completion"}, Completion, 1319),
        ("glaive_toolcall_en_demo.json", {}, Chat, 300),
        ("v1_sft_demo.jsonl", {}, Chat, 500),
        ("c4_demo.jsonl", {}, Text, 300),
        ("wiki_demo.txt", {}, Text, 30),
    ],
)
def test_real_sets_are_read_whole(name, columns, kind, number):
    examples = list(read(DATA / name, "auto", columns))
    assert [type(example) for example in examples] == [kind] * number
    content = (DATA / name).read_bytes()
    counted = len(json.loads(content)) if name.endswith(".json") else content.rstrip(b"\n").count(b"\n") + 1
    assert counted == number


@real_data
def test_real_rows_keep_every_character():
    rows = json.loads((DATA / "alpaca_en_demo.json").read_bytes())
    examples = read(DATA / "alpaca_en_demo.json")
    assert [(e.instruction, e.input, e.output) for e in examples] == [tuple(row.values()) for row in rows]

    rows = json.loads((DATA / "glaive_toolcall_en_demo.json").read_bytes())
    examples = list(read(DATA / "glaive_toolcall_en_demo.json"))
    assert [[turn.text or turn.written for turn in e.turns] for e in examples] == [
        [t["value"] for t in r["conversations"]] for r in rows
    ]
    tools = [json.loads(row["tools"]) for row in rows]
    assert [json.loads(example.tools or "[]") for example in examples] == tools

    text = (DATA / "wiki_demo.txt").read_text()
    assert "\n".join(example.text for example in read(DATA / "wiki_demo.txt")) == text.removesuffix("\n")


def test_what_json_cannot_write_is_refused_where_it_stands():
    call = {"name": "remind", "arguments": {"when": datetime(2026, 1, 2), "often": [1, 2.5, True, None]}}
    turns = [{"role": "user", "content": "Remind me."}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(RowError, match=r"messages\[1\].tool_calls\[0\].arguments.when is a datetime, which JSON"):
        parse({"messages": turns}, "messages")
