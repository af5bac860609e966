"""What is learned of a conversation, in thirteen chat templates: transformers' ids, and marks written by hand.

Each row of the table is a conversation, a template, and every document that must come of it as text, with what is to
be learned between brackets. transformers' tokenizer makes ids of that text and finds the tokens that hold a character
between brackets; transformers' `apply_chat_template` makes ids of the messages. Ours must be equal to both. And each
row names a mistake, known from other trainers, that is then made on purpose and must be caught.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine
from transformers import AutoTokenizer

from minitune.data import chat_template, chats, encoding, templates
from minitune.data.encoding import Document, Script, Tokens
from minitune.data.examples import Chat, Completion, Text
from minitune.data.formats import locate, parse, read
from minitune.data.objects import RowError
from minitune.data.templates import documents
from minitune.tokenizer import Tokenizer, load_tokenizer

# ---- templates, written for this table after the families that they are named for

LLAMA2 = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set briefing = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' -%}
{%- endif -%}
{%- endfor -%}
{%- set spoken = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- for message in spoken -%}
{%- if message.role == 'user' -%}
{{ bos_token }}[INST] {% if loop.first and messages[0].role == 'system' -%}
{{ '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' }}{% endif %}{{ message.content.strip() }} [/INST]
{%- else -%}{{ ' ' + message.content.strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- set last_asked = namespace(index=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last_asked.index = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == last_asked.index %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content + ', "id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']') }}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Thoughts stay only in answers after the last question; the last answer has a place for them even without any.
QWEN = """\
{%- set last = namespace(asked=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- if loop.index0 > last.asked and (loop.last or message.reasoning_content) %}
            {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
        {%- endif %}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# Numbers its turns from the last one backwards.
COUNTDOWN = """\
{% for message in messages %}
{{ loop.revindex0 + (1 if add_generation_prompt else 0) }}<|{{ message.role }}|>{{ message.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}0<|assistant|>{% endif %}"""

# The header stands within what is marked, and a note that no model is to write outside of it.
GENERATION = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- generation %}{{ '<|im_start|>assistant\\n' }}{% endgeneration %}{{ '(a note)\\n' }}
{%- generation %}{{ message.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# It marks the words alone: without the end of the turn, a model would never learn to stop.
WORDS_MARKED = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

ZEPHYR = """\
{% for message in messages %}
{{ '<|' + message.role + '|>\\n' + message.content + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}"""

# Closes each answer, and the whole once more.
PHI = """\
{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

COMMAND = """\
{{ bos_token }}{% for message in messages %}
{%- set speaker = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[message.role] %}
{{- '<|START_OF_TURN_TOKEN|><|' + speaker + '_TOKEN|>' + message.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

VICUNA = """\
{% for message in messages %}
{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': ''}[message.role] + message.content }}
{% endfor %}
{% if add_generation_prompt %}
{{ 'ASSISTANT:' }}
{%- endif %}"""

SPECIAL = [
    *("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
]

# ---- conversations


def says(role: str, content: str, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TALK = [says("user", "Hi there"), says("assistant", "Hello!"), says("user", "2+2?"), says("assistant", "It is 4.")]
BRIEFED = [says("system", "Be brief."), *TALK]
PARTLY = [says("system", "Be brief."), TALK[0], TALK[1] | {"train": False}, *TALK[2:]]
THOUGHTFUL = [TALK[0], TALK[1] | {"reasoning_content": "A greeting."}, TALK[2], TALK[3] | {"reasoning_content": "2+2."}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLING = [
    *TALK[:2],
    says("user", "2+2?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    says("tool", "4", tool_call_id="call00001"),
    says("assistant", "It is 4."),
]

# ---- mistakes


def learns_headers(patch: pytest.MonkeyPatch) -> None:
    """The mask begins one token early."""
    right = Tokens.marked
    patch.setattr(Tokens, "marked", lambda self, spans: earlier(right(self, spans)))


def earlier(marks: list[bool]) -> list[bool]:
    return [here or after for here, after in zip(marks, [*marks[1:], False], strict=True)]


def learns_no_ends(patch: pytest.MonkeyPatch) -> None:
    """The last token of each answer is left out."""
    right = Tokens.marked

    def marked(self: Tokens, spans: Any) -> list[bool]:
        marks = right(self, spans)
        return [here and after for here, after in zip(marks, [*marks[1:], False], strict=True)]

    patch.setattr(Tokens, "marked", marked)


def shifts_the_mask(patch: pytest.MonkeyPatch) -> None:
    right = Tokens.marked
    patch.setattr(Tokens, "marked", lambda self, spans: [False, *right(self, spans)[:-1]])


def begins_twice(patch: pytest.MonkeyPatch) -> None:
    """A bos before what the template wrote, whose own is there already."""
    wrong = lambda ids, marks, tokenizer: Document([tokenizer.bos_id, *ids], [False, *marks])  # noqa: E731
    patch.setattr(encoding, "begun", wrong)


def begins_never(patch: pytest.MonkeyPatch) -> None:
    """No bos, as the template writes none."""
    patch.setattr(encoding, "begun", lambda ids, marks, tokenizer: Document(ids, marks))


def leaves_padding_ids_out(patch: pytest.MonkeyPatch) -> None:
    """The mask is made of ids: what equals pad, which is eos here, is not learned."""
    right = encoding.ended

    def ended(*args: Any) -> Document:
        made = right(*args)
        tokenizer = args[-1]
        return replace(made, trained=[m and i != tokenizer.pad_id for i, m in zip(made.ids, made.trained, strict=True)])

    patch.setattr(encoding, "ended", ended)


def adds_no_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(chats, "finished", lambda text, answers, tokenizer: Script(text.rstrip(), tuple(answers)))


def trusts_the_whole(patch: pytest.MonkeyPatch) -> None:
    """The conversation is rendered once, and each answer found in it."""

    def scripts(chat: Chat, tokenizer: Tokenizer) -> list[Script]:
        whole = chat_template.View(len(chat.turns))
        text = chat_template.rendered(chat, [whole], tokenizer)[whole]
        answers, at = [], 0
        for turn in chat.turns:
            at = max(text.find(turn.text, at), at)
            if turn.train:
                answers.append(encoding.Answer(at, ((at, at + len(turn.text) + len("<|im_end|>")),)))
            at += len(turn.text)
        return [Script(text, tuple(answers))]

    patch.setattr(templates, "scripts", scripts)


def ignores_marks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(chats, "marks_answers", lambda source: False)


def learns_every_answer(patch: pytest.MonkeyPatch) -> None:
    """Flags of single turns are not looked at."""
    right = chats.scripts

    def scripts(chat: Chat, tokenizer: Tokenizer) -> list[Script]:
        turns = tuple(replace(turn, train=turn.role == "assistant") for turn in chat.turns)
        return right(replace(chat, turns=turns), tokenizer)

    patch.setattr(templates, "scripts", scripts)


def loses_tools(patch: pytest.MonkeyPatch) -> None:
    right = chats.scripts
    patch.setattr(templates, "scripts", lambda chat, tokenizer: right(replace(chat, tools=""), tokenizer))


def closes_nothing_twice(patch: pytest.MonkeyPatch) -> None:
    """An end that only the last text has is taken for a rewritten turn."""
    patch.setattr(chats, "as_in", lambda later, text, answers, tokenizer: answers if not text else None)


def learns_by_marks_alone(patch: pytest.MonkeyPatch) -> None:
    """What closes an answer is left out where the template does not mark it."""

    def wrong(prompt: str, upto: str, name: str, tokenizer: Tokenizer) -> tuple[str, Any]:
        plain, marks = chats.without_marks(upto)
        return plain, encoding.Answer(len(prompt), (marks[-1],))

    patch.setattr(chats, "marked_answer", wrong)


# ---- the table


@dataclass(frozen=True)
class Case:
    name: str
    template: str
    messages: list[dict[str, Any]]
    wanted: tuple[str, ...]  # each document's text, with what is learned between brackets
    mistake: Callable[[pytest.MonkeyPatch], None]
    tools: list[dict[str, Any]] = field(default_factory=list)
    adds_bos: bool = False  # does the tokenizer put one before a text


CASES = [
    Case(
        "llama2, which writes a bos for every question",
        LLAMA2,
        BRIEFED,
        (
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST]⟦ Hello! </s>⟧"
            "<s>[INST] 2+2? [/INST]⟦ It is 4. </s>⟧",
        ),
        begins_twice,
        adds_bos=True,
    ),
    Case(
        "llama3",
        LLAMA3,
        BRIEFED,
        (
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.<|eot_id|>⟧",
        ),
        learns_no_ends,
        adds_bos=True,
    ),
    Case(
        "chatml",
        CHATML,
        BRIEFED,
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n<|im_start|>user\n2+2?<|im_end|>\n"
            "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n",
        ),
        learns_headers,
    ),
    Case(
        "mistral, which lists its tools before the last question",
        MISTRAL,
        CALLING,
        (
            f"<s>[AVAILABLE_TOOLS]{json.dumps([ADD])}[/AVAILABLE_TOOLS][INST] Hi there[/INST]⟦ Hello!</s>⟧",
            f"<s>[INST] Hi there[/INST] Hello!</s>[AVAILABLE_TOOLS]{json.dumps([ADD])}[/AVAILABLE_TOOLS]"
            '[INST] 2+2?[/INST]⟦[TOOL_CALLS][{"name": "add", "arguments": {"a": 2, "b": 2}, "id": "call00001"}]</s>⟧'
            '[TOOL_RESULTS]{"content": 4, "id": "call00001"}[/TOOL_RESULTS]⟦ It is 4.</s>⟧',
        ),
        loses_tools,
        tools=[ADD],
        adds_bos=True,
    ),
    Case(
        "qwen, which drops old thoughts",
        QWEN,
        THOUGHTFUL,
        (
            "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\nA greeting.\n</think>\n\nHello!<|im_end|>⟧\n",
            "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n2+2.\n</think>\n\nIt is 4.<|im_end|>⟧\n",
        ),
        trusts_the_whole,
    ),
    Case(
        "gemma",
        GEMMA,
        TALK,
        (
            "<s><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n"
            "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n⟦It is 4.<end_of_turn>⟧\n",
        ),
        shifts_the_mask,
        adds_bos=True,
    ),
    Case(
        "one that writes every earlier turn otherwise",
        COUNTDOWN,
        TALK,
        (
            "1<|user|>Hi there<|end|>\n0<|assistant|>⟦Hello!<|end|>⟧\n",
            "3<|user|>Hi there<|end|>\n2<|assistant|>Hello!<|end|>\n1<|user|>2+2?<|end|>\n"
            "0<|assistant|>⟦It is 4.<|end|>⟧\n",
        ),
        trusts_the_whole,
    ),
    Case(
        "one with {% generation %} that marks its header",
        GENERATION,
        BRIEFED,
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
            "<|im_start|>assistant\n(a note)\n⟦Hello!<|im_end|>\n⟧<|im_start|>user\n2+2?<|im_end|>\n"
            "<|im_start|>assistant\n(a note)\n⟦It is 4.<|im_end|>\n⟧",
        ),
        ignores_marks,
    ),
    Case(
        "one with {% generation %} that marks no ends",
        WORDS_MARKED,
        TALK,
        (
            "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n",
        ),
        learns_by_marks_alone,
    ),
    Case(
        "zephyr, which ends its turns with eos, and its tokenizer pads with it",
        ZEPHYR,
        BRIEFED,
        (
            "<|system|>\nBe brief.</s>\n<|user|>\nHi there</s>\n<|assistant|>\n⟦Hello!</s>⟧\n"
            "<|user|>\n2+2?</s>\n<|assistant|>\n⟦It is 4.</s>⟧\n",
        ),
        leaves_padding_ids_out,
    ),
    Case(
        "zephyr, which writes no bos where the tokenizer has one",
        ZEPHYR,
        TALK,
        (
            "<s><|user|>\nHi there</s>\n<|assistant|>\n⟦Hello!</s>⟧\n"
            "<|user|>\n2+2?</s>\n<|assistant|>\n⟦It is 4.</s>⟧\n",
        ),
        begins_never,
        adds_bos=True,
    ),
    Case(
        "phi, which closes the whole once more",
        PHI,
        TALK,
        (
            "<|user|>\nHi there<|end|>\n<|assistant|>\n⟦Hello!<|end|>⟧\n"
            "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟦It is 4.<|end|>\n</s>⟧",
        ),
        closes_nothing_twice,
    ),
    Case(
        "command, with an answer that is not to be learned",
        COMMAND,
        PARTLY,
        (
            "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi there<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hello!<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>2+2?<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦It is 4.<|END_OF_TURN_TOKEN|>⟧",
        ),
        learns_every_answer,
        adds_bos=True,
    ),
    Case(
        "vicuna, which closes nothing",
        VICUNA,
        BRIEFED,
        ("<s>Be brief.\nUSER: Hi there\nASSISTANT:⟦ Hello!⟧\nUSER: 2+2?\nASSISTANT:⟦ It is 4.</s>⟧",),
        adds_no_end,
        adds_bos=True,
    ),
]
ids_of_cases = [case.name for case in CASES]

# ---- tokenizers: byte-level as Llama 3's, and with a ▁ for each space as Llama 2's


@pytest.fixture(scope="module", params=["byte-level", "metaspace"])
def make(request, tmp_path_factory) -> Callable[[str, bool], tuple[Tokenizer, Any]]:
    """make(chat template, does it add bos) -> our tokenizer and transformers', of one folder."""
    if request.param == "byte-level":
        engine = Engine(models.BPE())
        words = Regex(r"[\r\n]+| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")  # line breaks by themselves
        splits = [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        engine.pre_tokenizer = pre_tokenizers.Sequence(splits)
        engine.decoder = decoders.ByteLevel()
        alphabet, bytes_ = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        engine = Engine(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # no token reaches over a space
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        engine.decoder = decoders.Sequence(parts)
        alphabet, bytes_ = [], ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*bytes_, *SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    lines = (line for example in read(locate("tiny")) for text in templates.texts(example) for line in text.split("\n"))
    engine.train_from_iterator((f"{line}\n\n\n" for line in lines), trainer)  # so that line breaks are merged
    state = json.loads(engine.to_str())
    if request.param == "metaspace":
        state["pre_tokenizer"]["split"] = False  # as Llama's: a text is one word
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    made: dict[tuple[str, bool], tuple[Tokenizer, Any]] = {}

    def make(template: str, adds_bos: bool) -> tuple[Tokenizer, Any]:
        if (template, adds_bos) in made:
            return made[template, adds_bos]
        folder = tmp_path_factory.mktemp("tokenizer")
        engine = Engine.from_str(json.dumps(state))
        bos = engine.token_to_id("<s>")
        start = "<s> " if adds_bos else ""
        engine.post_processor = processors.TemplateProcessing(single=f"{start}$A", special_tokens=[("<s>", bos)])
        engine.save(str(folder / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": template}))
        made[template, adds_bos] = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        return made[template, adds_bos]

    return make


# ---- the references


def by_hand(wanted: str, case: Case, reference: Any) -> tuple[list[int], list[bool]]:
    """The ids of a text as transformers makes them, and whether each holds a character between the brackets."""
    text, inside, learned = "", False, []
    for character in wanted:
        if character in "⟦⟧":
            inside = character == "⟦"
        else:
            text += character
            learned.append(inside)
    begun = case.adds_bos and "bos_token" not in case.template
    if begun:  # a bos that is no part of the text: what follows is encoded as a beginning
        text, learned = text.removeprefix("<s>"), learned[len("<s>") :]
    made = reference(text, add_special_tokens=False, return_offsets_mapping=True)
    marks = [any(learned[start:stop]) for start, stop in made["offset_mapping"]]
    return [reference.bos_token_id] * begun + made["input_ids"], [False] * begun + marks


def row_of(case: Case) -> dict[str, Any]:
    return {"messages": case.messages, "tools": case.tools}


def asked(messages: list[dict[str, Any]], case: Case, reference: Any, ask: bool = False) -> list[int]:
    """transformers' ids of messages; with the bos that the tokenizer adds where the template leaves it to it, and the
    eos that we add where the template closes nothing."""
    options = {"tools": case.tools or None, "add_generation_prompt": ask}
    ids = reference.apply_chat_template(messages, **options)["input_ids"]
    if case.template == VICUNA and not ask:
        text = reference.apply_chat_template(messages, **options, tokenize=False)
        ids = [*reference(text.rstrip(), add_special_tokens=False)["input_ids"], reference.eos_token_id]
    return ids if ids[0] == reference.bos_token_id or not case.adds_bos else [reference.bos_token_id, *ids]


def check(case: Case, tokenizer: Tokenizer, reference: Any) -> None:
    made = documents(parse(row_of(case), "messages"), "auto", tokenizer)
    assert [(document.ids, document.trained) for document in made] == [
        by_hand(text, case, reference) for text in case.wanted
    ]


@pytest.mark.parametrize("case", CASES, ids=ids_of_cases)
def test_the_mask_is_the_one_written_by_hand(make, case):
    check(case, *make(case.template, case.adds_bos))


@pytest.mark.parametrize("case", CASES, ids=ids_of_cases)
def test_a_known_mistake_is_caught(make, case, monkeypatch):
    tokenizer, reference = make(case.template, case.adds_bos)
    case.mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check(case, tokenizer, reference)


@pytest.mark.parametrize("case", CASES, ids=ids_of_cases)
def test_ids_are_those_of_apply_chat_template(make, case):
    """Each document is what transformers makes of the conversation up to some answer, and each answer in it follows
    what transformers makes of the question."""
    tokenizer, reference = make(case.template, case.adds_bos)
    made = documents(parse(row_of(case), "messages"), "auto", tokenizer)
    answers = [number for number, turn in enumerate(case.messages) if turn["role"] == "assistant"]
    learned = [number for number in answers if case.messages[number].get("train", True)]
    uptos = [asked(case.messages[: number + 1], case, reference) for number in learned]
    assert all(document.ids in uptos for document in made)
    begun = [
        (document, place)
        for document in made
        for place, marks in enumerate(zip([False, *document.trained], document.trained, strict=False))
        if marks == (False, True)
    ]
    note = "(a note)\n" if case.template == GENERATION else ""
    for (document, place), number in zip(begun, learned, strict=True):
        prompt = asked(case.messages[:number], case, reference, ask=True)
        assert document.ids[: len(prompt)] == prompt
        assert reference.decode([*prompt, *document.ids[len(prompt) : place]]) == reference.decode(prompt) + note


# ---- what no template may do


def refusal(make: Callable, template: str, row: dict[str, Any]) -> RowError:
    with pytest.raises(RowError) as error:
        documents(parse(row, "messages"), "auto", make(template, True)[0])
    return error.value


def test_a_role_that_the_template_refuses_is_refused_with_its_reason(make):
    error = refusal(make, GEMMA, {"messages": BRIEFED})
    assert str(error) == "the tokenizer's chat template refuses it: System role not supported"


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (
            GEMMA.replace("{{ raise_exception('System role not supported') }}", "{% set messages = messages[1:] %}"),
            {"messages": BRIEFED},
            "messages[0] is left out by the chat template (system)",
        ),
        (
            CHATML.replace("message.content", "message.content.split('</think>')[-1]"),
            {"messages": [TALK[0], says("assistant", "<think>A greeting.</think>Hello!")]},
            "messages[1] is left out in part by the chat template: '<think>A greeting.</think>Hello!'",
        ),
        (
            CHATML,
            {"messages": THOUGHTFUL},
            "messages[1].reasoning_content is not shown by the tokenizer's chat template",
        ),
        (CHATML, {"messages": CALLING}, "messages[3].tool_calls is not shown by the tokenizer's chat template"),
        (
            CHATML.replace("assistant\\n", "assistant\\n<think>"),
            {"messages": TALK},
            "messages[1] is not begun by the chat template as it asks for it",
        ),
        (
            CHATML.replace("message.content", "(message.content if message.role == 'user' else '')"),
            {"messages": TALK[:2]},
            "messages[1] is left out in part by the chat template: 'Hello!'",
        ),
        (
            WORDS_MARKED.replace("{{- '<|im_end|>", "{{- ' (said the model)<|im_end|>"),
            {"messages": TALK},
            "messages[1] goes on after what the chat template marks as generated, with '(said the model)<|im_end|>'",
        ),
    ],
)
def test_what_a_template_would_leave_out_is_refused_by_name(make, template, row, reason):
    assert str(refusal(make, template, row)).startswith(reason)


def test_calls_of_sharegpt_are_calls_where_the_template_knows_them_and_text_elsewhere(make):
    written = json.dumps({"name": "add", "arguments": {"a": 2, "b": 2}})
    turns = [("human", "2+2?"), ("function_call", written), ("observation", "4"), ("gpt", "It is 4.")]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], "tools": json.dumps([ADD])}
    template = MISTRAL.replace("call.id", "'call00001'").replace("message.tool_call_id", "'call00001'")
    tokenizer, reference = make(template, True)
    [made] = documents(parse(row, "sharegpt"), "auto", tokenizer)
    expected = reference.apply_chat_template(CALLING[2:], tools=[ADD])
    assert made.ids == expected["input_ids"]

    tokenizer, _ = make(CHATML, True)
    [made] = documents(parse(row, "sharegpt"), "auto", tokenizer)
    assert f"<|im_start|>assistant\n{written}<|im_end|>" in tokenizer.decode(made.ids, skip_special=False)


# ---- for any text


LETTERS = st.text(alphabet="abow W1.,'\n\t é你\u00a0\u2028🙂</|#", min_size=1, max_size=12)
SAID = LETTERS.filter(lambda text: text.strip() and "<s>" not in text)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages += [says("user", draw(SAID)), says("assistant", draw(SAID), train=draw(st.booleans()))]
    messages[draw(st.integers(0, len(messages) // 2 - 1)) * 2 + 1]["train"] = True
    return messages


ANY = [case for case in CASES if case.template != GENERATION]


@pytest.mark.parametrize("case", ANY, ids=[case.name for case in ANY])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=conversations())
def test_any_conversation_is_learned_once_and_behind_the_prompts_of_inference(make, case, messages):
    case = replace(case, tools=[])
    tokenizer, reference = make(case.template, case.adds_bos)
    learned = [number for number, turn in enumerate(messages) if turn.get("train")]
    uptos = [asked(messages[: number + 1], case, reference) for number in range(1, len(messages), 2)]
    prompts = {tuple(asked(messages[:number], case, reference, ask=True)): number for number in learned}
    found = []
    for document in documents(parse({"messages": messages}, "messages"), "auto", tokenizer):
        ids, marks = document.ids, document.trained
        starts = [at for at, mark in enumerate(marks) if mark and not marks[at - 1]]
        found += [prompts[tuple(ids[:at])] for at in starts]  # each answer stands behind a prompt of inference
        if ids not in uptos:  # a token would reach over the seam: the prompt's ids, then the answer's alone
            [at] = starts
            upto = asked(messages[: prompts[tuple(ids[:at])] + 1], case, reference)
            assert upto[:at] != ids[:at]
            assert tokenizer.decode(upto, skip_special=False).startswith(tokenizer.decode(ids, skip_special=False))
        begins = uptos[0][0] == tokenizer.bos_id
        assert ids[:2].count(tokenizer.bos_id) == begins
        ends = [at for at, mark in enumerate(marks) if mark and not [*marks, False][at + 1]]
        closed = [tokenizer.decode([ids[at]]) == "" for at in ends]
        assert all(closed) or case.template == VICUNA
        assert closed[-1] or not marks[-1]
    assert sorted(found) == learned


BREAKS = [says("user", "Hi"), says("assistant", "\n\nHello!"), says("user", "2+2?"), says("assistant", "4")]


def check_breaks(tokenizer: Tokenizer, reference: Any, case: Case) -> None:
    """Line breaks that an answer begins with would be merged with the one that ends its prompt."""
    [whole, first] = documents(parse({"messages": BREAKS}, "messages"), "auto", tokenizer)
    asked_first, asked_last = (asked(BREAKS[:number], case, reference, ask=True) for number in (1, 3))
    for made, prompt, learned in ((first, asked_first, "\n\nHello!"), (whole, asked_last, "4")):
        begun = made.trained.index(True)
        assert made.ids[:begun] == prompt
        ids = [id for id, mark in zip(made.ids, made.trained, strict=True) if mark]
        assert tokenizer.decode([*prompt, *ids]) == tokenizer.decode(prompt) + learned
    assert whole.ids == asked(BREAKS, case, reference)


def test_an_answer_that_would_merge_with_its_prompt_is_learned_behind_it(make, monkeypatch):
    case = next(case for case in CASES if case.template == CHATML)
    tokenizer, reference = make(CHATML, False)
    if tokenizer.continuation is not tokenizer.engine:
        pytest.skip("this tokenizer merges no line breaks")
    check_breaks(tokenizer, reference, case)
    monkeypatch.setattr(encoding, "prompt_end", lambda *_: ("", []))  # nothing is compared
    with pytest.raises(ValueError, match="not enough values"):
        check_breaks(tokenizer, reference, case)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.one_of(st.just(""), SAID), answer=SAID)
def test_any_completion_goes_on_from_the_ids_of_its_prompt(make, prompt, answer):
    tokenizer, reference = make("", True)
    [made] = documents(Completion(prompt, answer), "auto", tokenizer)
    begun = made.trained.index(True)
    assert made.ids[:begun] == reference(prompt)["input_ids"]  # with its bos
    assert made.trained == [False] * begun + [True] * (len(made.ids) - begun)
    whole = prompt + answer
    if tokenizer.continuation is not tokenizer.engine:
        whole = whole.removeprefix(" ")  # which decoding takes for the one that is put before a text
    assert tokenizer.decode(made.ids[1:-1], skip_special=False) == whole
    assert (made.ids[-1], made.ids.count(tokenizer.bos_id)) == (tokenizer.eos_id, 1)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=SAID)
def test_any_text_has_the_ids_of_transformers(make, text):
    tokenizer, reference = make("", True)
    [made] = documents(Text(text), "auto", tokenizer)
    assert made.ids == [*reference(text)["input_ids"], tokenizer.eos_id]
    assert made.trained == [False] + [True] * (len(made.ids) - 1)
