"""Rows that hold a conversation -> Chat: messages, ShareGPT, and prompts and completions that are lists of messages.

What a message says beside its text (tool calls, thoughts, names) goes on to the chat template under the names that
chat templates know; what cannot go on is refused by the path of its key.
"""

import json
from collections.abc import Iterator
from typing import Any

from minitune.data.examples import Chat, Turn
from minitune.data.fields import (
    check_all_characters,
    check_characters,
    filled,
    items,
    optional,
    path,
    refuse_others,
    text,
    value_of,
)
from minitune.data.objects import Row, RowError, kind, parse_json

ROLE_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
OTHER_ROLES = {"function": "tool"}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
MARKS = ("train", "loss_weight", "weight")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names that data sets use for one thing
ABOUT = ("id", "message_id", "parent_id", "timestamp", "date", "created", "created_at", "model", "source", "lang")
ABOUT += ("language", "index", "turn", "metadata")  # said of a message, not in it: never shown to a model
MESSAGE = frozenset(["role", "content", "name", "tool_call_id", "tool_calls", "function_call", *THOUGHTS])
MESSAGE |= {*MARKS, *ABOUT}
SHAREGPT = frozenset(["from", "value", *MARKS, *ABOUT])
UNREAD = "says something that no part of a conversation here can hold; leave it out, or write it into the content"
NOT_IN_CHATS = ("functions", "function_call", "documents", "chat_template_kwargs", "images", "videos", "audios")


def messages(row: Row, origin: str) -> Chat:
    return chat([message(item, here) for here, item in items(row, "messages")], row, origin)


def sharegpt(row: Row, origin: str) -> Chat:
    return chat([spoken(item, here) for here, item in items(row, "conversations")], row, origin)


def conversational(row: Row, origin: str) -> Chat:
    """A prompt and a completion that are messages; an answer in the prompt is learned only where it says so."""
    asked = [message(item, here, learned=False) for here, item in items(row, "prompt")]
    return chat([*asked, *(message(item, here) for here, item in items(row, "completion"))], row, origin)


def chat(turns: list[Turn], row: Row, origin: str) -> Chat:
    """A conversation whose turns come in an order that can be learned from."""
    for name in NOT_IN_CHATS:
        if row.get(name):
            raise RowError(UNREAD, name)
    if row.get("system"):
        turns.insert(0, Turn("system", text(row, "system"), False, place="system"))
    before = None
    for turn in turns:
        if before not in ROLE_MAY_FOLLOW[turn.role]:
            follows = f"follows {before}" if before else "comes first"
            raise RowError(f"is out of order: {turn.role} {follows}", turn.place)
        before = turn.role
    if before != "assistant":
        raise RowError(f"ends the conversation with {before}, not with an answer of the assistant", turns[-1].place)
    return Chat(tuple(turns), tools_of(row), origin)


# ---- one message ---------------------------------------------------------------------------------------------------


def message(item: Row, place: str, learned: bool = True) -> Turn:
    """A message as OpenAI and chat templates write it.

    Args:
        learned: whether an answer that says nothing about it is to be learned.
    """
    role = text(item, "role", place)
    role = OTHER_ROLES.get(role, role)
    if role not in ROLE_MAY_FOLLOW:
        raise RowError(f"is {role!r}; the roles are {', '.join(ROLE_MAY_FOLLOW)}", path(place, "role"))
    refuse_others(item, place, MESSAGE, UNREAD)
    more: dict[str, Any] = {name: value for name in ("name", "tool_call_id") if (value := optional(item, name, place))}
    thoughts = {name: value for name in THOUGHTS if (value := optional(item, name, place)).strip()}
    calls = [call(each, here) for here, each in calls_of(item, place)]
    for names, there in (("tool_calls", calls), (next(iter(thoughts), ""), thoughts)):
        if there and role != "assistant":
            raise RowError(f"stands in a turn of {role}; only an assistant's can hold it", path(place, names))
    if len(set(thoughts.values())) > 1:
        raise RowError(f"says one thing and {list(thoughts)[1]} another", path(place, next(iter(thoughts))))
    if thoughts:
        more["reasoning_content"] = next(iter(thoughts.values()))
    if calls:
        more["tool_calls"] = calls
    said = "" if calls and item.get("content") is None else content(item, place)
    if role == "assistant" and not calls and not said.strip():
        raise RowError("is empty", path(place, "content"))
    return Turn(role, said, to_be_learned(item, role, place, learned), as_json(more), place=place)


def spoken(item: Row, place: str) -> Turn:
    """A message as ShareGPT writes it."""
    speaker = text(item, "from", place)
    if speaker not in SHAREGPT_ROLES:
        raise RowError(f"is {speaker!r}; the speakers are {', '.join(SHAREGPT_ROLES)}", path(place, "from"))
    refuse_others(item, place, SHAREGPT, UNREAD)
    role = SHAREGPT_ROLES[speaker]
    said = filled(item, "value", place) if role == "assistant" else text(item, "value", place)
    train = to_be_learned(item, role, place)
    if speaker != "function_call":
        return Turn(role, said, train, place=place)
    return Turn(role, "", train, as_json({"tool_calls": written_calls(said, path(place, "value"))}), said, place)


def content(item: Row, place: str) -> str:
    """The text of a message, which may come in parts."""
    if not isinstance(value_of(item, "content", place), list):
        return text(item, "content", place)
    if not item["content"]:
        return ""
    parts = []
    for here, part in items(item, "content", place):
        if part.get("type") != "text":
            raise RowError(f"is not a part of type 'text' but {part.get('type')!r}", here)
        name = "value" if part.get("text") is None and "value" in part else "text"
        refuse_others(part, here, frozenset(["type", name]), UNREAD)
        parts.append(text(part, name, here))
    return "".join(parts)


def to_be_learned(item: Row, role: str, place: str, learned: bool = True) -> bool:
    marks = {name: item[name] for name in MARKS if item.get(name) is not None}
    if not marks:
        return role == "assistant" and learned
    name = next(iter(marks))
    if any(mark not in (0, 1) for mark in marks.values()) or len(set(map(bool, marks.values()))) > 1:
        raise RowError("is true or false (or 1 or 0), and all marks of a turn say the same", path(place, name))
    if marks[name] and role != "assistant":
        why = "would train on a turn that is not the assistant's; see data.train_on_prompt"
        raise RowError(why, path(place, name))
    return bool(marks[name])


# ---- tools ---------------------------------------------------------------------------------------------------------


def calls_of(item: Row, place: str) -> Iterator[tuple[str, Row]]:
    """The tool calls of a message with their paths; function_call is the older way to write one."""
    if item.get("tool_calls") and item.get("function_call"):
        raise RowError("stands beside tool_calls; a message has one of them", path(place, "function_call"))
    if item.get("tool_calls"):
        yield from items(item, "tool_calls", place)
    elif item.get("function_call"):
        here = path(place, "function_call")
        if not isinstance(item["function_call"], dict):
            raise RowError(f"is {kind(item['function_call'])}, not an object", here)
        yield here, item["function_call"]


def call(item: Row, place: str) -> Row:
    """A tool call as chat templates read it: {"type": "function", "function": {"name", "arguments"}}, with its id."""
    function, here = item, place
    about = {}
    if "function" in item:
        if item.get("type", "function") not in ("function", None):
            raise RowError(f"is {item['type']!r}; only functions can be called", path(place, "type"))
        refuse_others(item, place, frozenset(["type", "function", "id", "index"]), UNREAD)
        about = {"id": call_id} if (call_id := optional(item, "id", place)) else {}
        function, here = value_of(item, "function", place), path(place, "function")
        if not isinstance(function, dict):
            raise RowError(f"is {kind(function)}, not an object", here)
    refuse_others(function, here, frozenset(["name", "arguments"]), UNREAD)
    name, arguments = filled(function, "name", here), value_of(function, "arguments", here)
    if isinstance(arguments, str):
        arguments = json_in(arguments, path(here, "arguments")) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowError(f"is {kind(arguments)}, not an object", path(here, "arguments"))
    check_all_characters(arguments, path(here, "arguments"))
    return about | {"type": "function", "function": {"name": name, "arguments": arguments}}


def written_calls(written: str, here: str) -> list[Row]:
    """The calls that ShareGPT's function_call writes: a JSON object with name and arguments, or a list of them."""
    try:
        calls = json_in(written, here)
        calls = calls if isinstance(calls, list) and calls else [calls]
        if not all(isinstance(each, dict) and "name" in each and "arguments" in each for each in calls):
            raise RowError("is not an object with name and arguments, nor a list of such", here)
    except RowError as error:
        raise RowError(f"{error.reason}; a call that is to stand as it is comes from 'gpt'", here) from None
    return [call(each, here) for each in calls]


def tools_of(row: Row) -> str:
    """The tools that a conversation may call, as a JSON list; empty: none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        check_characters(tools, "tools")
        tools = json_in(tools, "tools") if tools.strip() else None
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("is not a list of objects", "tools")
    check_all_characters(tools, "tools")
    return as_json(tools)


def json_in(written: str, here: str) -> Any:
    try:
        return parse_json(written)
    except RowError as error:
        raise RowError(f"is JSON in which {error}" if error.key else f"is {error.reason}", here) from None


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""
