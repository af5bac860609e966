"""Chat templates out of folders that nobody vouches for: held to a budget, and otherwise as transformers runs them."""

# ruff: noqa: E501  (expressions, many to a line)

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hostile_templates import BOMBS, INJECTIONS, tried
from transformers.utils.chat_template_utils import render_jinja_template

from minitune.data.meters import BUDGET, weight_of
from minitune.data.sandbox import ChatTemplate
from minitune.errors import UserError

TEMPLATES = {path.stem: path.read_text() for path in sorted(Path(__file__).parents[1].glob("templates/*.jinja"))}
ASK = {"documents": None, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"look_up_{number}",
            "description": "Look something up\nfor the user: “é”",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "where"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["city"],
            },
        },
    }
    for number in range(3)
]
TOOL_ROUND = [
    {"role": "user", "content": "What of Paris?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "abcdefghi", "type": "function", "function": {"name": "look_up_0", "arguments": {"city": "Paris"}}}
        ],
    },
    {"role": "tool", "content": '{"sky": "grey"}', "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nGrey & <wet>."},
]


def chat(turns: int, seed: int = 0) -> list[dict[str, object]]:
    draw = random.Random(seed)
    words = ["lamp", "chair ", "\n", "<b>", "&amp;", "{{ x }}", "%s", "é", "日本", "'", '"', "  "]
    text = lambda: "".join(draw.choices(words, k=draw.randint(0, 12)))  # noqa: E731
    pairs = [[{"role": "user", "content": text()}, {"role": "assistant", "content": text()}] for _ in range(turns)]
    return [{"role": "system", "content": "Be kind."}, *(turn for pair in pairs for turn in pair)]


def theirs(source: str, messages: list[dict[str, object]], tools: list[object] | None) -> str:
    """What transformers makes of it, or the error that it raises."""
    try:
        [text], _ = render_jinja_template(
            [messages], tools, None, source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
    except Exception as error:
        return repr(error)
    return text


def ours(source: str, messages: list[dict[str, object]], tools: list[object] | None) -> str:
    try:
        return ChatTemplate(source).render(messages=messages, tools=tools, **ASK)
    except UserError:
        raise
    except Exception as error:
        return repr(error)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    chats = [(chat(turns, seed), tools) for seed in range(4) for turns in (1, 2, 7) for tools in (None, TOOLS)]
    chats += [([*chat(1)[1:], *TOOL_ROUND], TOOLS), (TOOL_ROUND, None), ([{"role": "user", "content": [1]}], None)]
    texts = 0
    for messages, tools in chats:
        expected = theirs(TEMPLATES[name], messages, tools)
        assert ours(TEMPLATES[name], messages, tools) == expected
        texts += not expected.startswith(("TemplateError", "TypeError", "UndefinedError"))
    assert texts > len(chats) // 2  # else only errors have been compared


@pytest.mark.parametrize(
    "expression",
    [
        "1 + 2 + 3.5", "'a' + 'b' ~ 1", "'a' + ('<b>'|safe)", "('<'|e) + '<' + 'x'", "'%s-%3d|%%' % ('a', 5)", "'ab' * 3", "3 * [1, 2]",
        "2 ** 10 - 7 // 2 + 7 % 4", "-3 / 2", "[1, 2] + [3]", "(1, 2) + (3,)", "'a' + 1", "1 < 2 < 3", "[1] == [1.0]",
        "{'a': [1]} == {'a': [1]}", "'x' in 'xyz'", "5 in [1, 5]", "[1] in [[1]]", "'role' in messages[0]", "1 not in (2, 3)",
        "messages[0]['content'][1:3]", "messages[-1:]", "messages[0].nope is defined", "messages[0].items()|list",
        "messages|map(attribute='role')|unique|join('/')", "messages|selectattr('role', 'eq', 'user')|list|length",
        "messages|rejectattr('role', 'in', ['user'])|map(attribute='content')|first", "messages|groupby('role')|list|length",
        "messages|sort(attribute='content,role')|map(attribute='role')|list", "[3, 1, 2]|sort(reverse=true)", "['b', 'A']|sort",
        "[3, 1]|max", "[{'a': 2}, {'a': 1}]|min(attribute='a')", "[1, 2]|sum", "[{'a': 2}]|sum(attribute='a', start=3)",
        "{'b': 1, 'a': 2}|dictsort", "{'b': 1}|items|list", "range(7)|batch(3, 0)|list", "range(7)|slice(3)|map('list')|list",
        "'a b'|title", "' x '|trim", "'xxaxx'|trim('x')", "'aXb'|lower|upper|capitalize", "'a\\nb'|indent(2, true)", "'a'|center(7)",
        "'aaa'|replace('a', 'bb', 2)", "'a<b'|e", "('a<b'|safe).upper()", "'long text here'|truncate(8)", "'5'|int + 1", "'zz'|int(3, 36)",
        "'ff'|int(0, 16)", "2.567|round(1, 'floor')", "messages|tojson(indent=2)", "{'b': 1, 'a': 'é'}|tojson(sort_keys=true)",
        "[1, 2]|tojson(separators=(',', ':'))", "[1, [2, {'a': none}]]|string", "'%s and %s'|format('a', 'b')", "'{} {:>4} {a!r}'.format(1, 2, a='x')",
        "'a,b,,c'.split(',')", "' a  b '.split()", "'a-b-c'.rsplit('-', 1)", "'a\\nb'.splitlines()", "'-'.join(['a', 'b'])",
        "'-'.join(messages|map(attribute='role'))", "'abc'.replace('b', 'xx')", "'abc'.startswith(('a', 'b'))", "'abc'.find('c')",
        "'a'.ljust(3) + '|' + '7'.zfill(3)", "'abc'.partition('b')", "'x'.isdigit()", "[1, 2, 2].count(2)", "[1, 2].index(2)", "{'a': 1}.get('b', 5)",
        "namespace(a=1).a", "dict(a=1)", "dict([('a', 1)])", "undefined_name", "[none, true, 1.5]", "7 is odd", "8 is divisibleby(4)", "'A' is upper",
        "'abc'|list", "'abc'|reverse", "[1, 2]|reverse|list", "'abc'|first + 'abc'|last", "cycler('a', 'b').next()", "x|default('d')", "''|d('e', true)",
        "none is none and 1 is integer", "'a' if messages else 'b'", "messages|length", "'a'|attr('upper')()", "[[1, 2], [3]]|sum(start=[])",
        "['a', 'b']|map('replace', 'a', 'x')|list", "[1, 2, 3]|select('greaterthan', 1)|list", "[['b', 1], ['a', 2]]|sort", "1e3|int", "3|abs",
    ],
)  # fmt: skip
def test_expressions_are_as_in_transformers(expression):
    source = "{% set r = " + expression + " %}{{ r }}|{{ r ~ '' }}|{{ " + expression + " }}"
    assert ours(source, chat(2), None) == theirs(source, chat(2), None)


@pytest.mark.parametrize("name", INJECTIONS)
def test_injections_reach_nothing(name):
    assert tried(INJECTIONS[name]).startswith(("refused", "raised: UndefinedError"))


HARMLESS = ("many outputs", "many variables", "a long power of numbers")  # slow to compile at worst


def test_bombs_are_refused_within_seconds_and_megabytes():
    """All in one process, whose memory is limited: none may take a second of CPU, or 500 MB beyond what is there."""
    program = """
import json, resource, sys, time
from hostile_templates import BOMBS, tried
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 500_000_000,) * 2)
for name, source in BOMBS.items():
    started = time.process_time()
    print(json.dumps([name, tried(source)[:200], time.process_time() - started]), flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in results] == list(BOMBS), done.stderr[-2000:]
    for name, ending, seconds in results:
        assert seconds < 3, (name, seconds)
        assert "MemoryError" not in ending, name
        assert ending.startswith(("refused", "raised")) or name in HARMLESS, (name, ending)


def test_the_memory_limit_of_the_bombs_bites():
    """The negative control: the same limit, and the plain sandbox of jinja."""
    program = """
import resource
from jinja2.sandbox import ImmutableSandboxedEnvironment
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 500_000_000,) * 2)
ImmutableSandboxedEnvironment(optimized=False).from_string("{% set a = n * 2000000000 %}").render(n="a")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode and "MemoryError" in done.stderr


@pytest.mark.parametrize("name", ["tools_in_brackets", "thinking", "tools_by_header"])
def test_a_conversation_of_two_thousand_turns_is_within_its_budget(name):
    messages = chat(1000)[1:]
    for message in messages:
        message["content"] += " some words more" * 10
    assert ours(TEMPLATES[name], messages, TOOLS) == theirs(TEMPLATES[name], messages, TOOLS)


def test_a_template_that_looks_at_every_message_for_each_is_within_its_budget():
    source = (
        "{% for m in messages %}{% set ns = namespace(n=0) %}{% for other in messages[loop.index:] %}"
        "{% if other.role == 'assistant' and 'tool_calls' not in other %}{% set ns.n = ns.n + 1 %}{% endif %}"
        "{% endfor %}{{ ns.n }}{% endfor %}"
    )
    messages = chat(500)
    assert ours(source, messages, None) == theirs(source, messages, None)


def test_the_budget_is_counted_and_not_timed():
    template = ChatTemplate(TEMPLATES["typed_macros"])
    spent = set()
    for _ in range(3):
        template.render(messages=chat(3), tools=TOOLS, **ASK)
        spent.add(BUDGET - template.meters.left)
    assert len(spent) == 1 and spent.pop() > 1000


def test_a_budget_is_each_renderings_own():
    """Two threads on one template: what one spends, the other does not miss."""
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}{{ messages[0].content }}")
    texts: list[str] = []

    def run(text: str) -> None:
        for _ in range(3):
            texts.append(template.render(messages=[{"role": "user", "content": text}], **ASK))

    threads = [threading.Thread(target=run, args=(text,)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted("abcd" * 3)


def test_the_weight_of_a_value_is_that_of_its_text():
    value = {"a": [1, "text", ("x" * 50, None)], "b": {"c": "d" * 30}}
    assert len(repr(value)) <= weight_of(value, 10**6) <= 20 * len(repr(value))
    held = ["ab"]
    for _ in range(40):
        held = [held, held]
    started = time.process_time()
    assert weight_of(held, 10**6) > 10**6  # and the other 10^12 are not counted
    assert time.process_time() - started < 1


def test_what_a_template_says_cannot_take_hold_of_the_terminal():
    with pytest.raises(UserError) as caught:
        ChatTemplate("{% \x1b]0;owned\x07 %}")
    assert caught.value.args[0].isprintable()
