"""Examples -> ids and marks: exact ids, exact marks, one bos, and transformers' own rendering as the reference."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from minitune.data import templates
from minitune.data.chat_template import View, rendered
from minitune.data.examples import Chat, Completion, Example, Instruction, Text, Turn
from minitune.data.formats import locate, parse, read
from minitune.data.objects import RowError
from minitune.data.templates import Document, documents, instruction_ids, only_answer, prompt_ids
from minitune.errors import UserError
from minitune.pretrained import TINY
from minitune.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")

CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\nTools: ' }}
    {%- for tool in tools %}{{- tool | tojson(indent=2) }}{% endfor %}
    {{- '<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\n\n' }}
        {%- generation %}{{- message['content'] | trim + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}
    {%- endif %}
    {%- if loop.index > 100 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n\n' }}
{%- endif %}
"""

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}\
{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}\
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}\
{% endfor %}"""

VICUNA = """\
{% for message in messages %}{% if message['role'] == 'user' %}USER: {{ message['content'] }}
{% else %}{{ 'ASSISTANT: ' + message['content'] + '\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""

# Like Qwen3's: thoughts are left out of answers once others follow.
FORGETFUL = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}\
{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "vicuna": VICUNA}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[..., tuple[Tokenizer, Path]]:
    """A tokenizer folder: byte-level BPE trained here and now, with or without a bos and a chat template."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator((text for e in read(locate("tiny")) for text in templates.texts(e)), trainer)

    def make(chat_template: str | None = None, adds_bos: bool = True) -> tuple[Tokenizer, Path]:
        folder = tmp_path_factory.mktemp("tokenizer")
        start = "<s> " if adds_bos else ""
        engine.post_processor = processors.TemplateProcessing(
            single=f"{start}$A", pair=f"{start}$A $B", special_tokens=[("<s>", 0)]
        )
        engine.save(str(folder / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        if chat_template is not None:
            about["chat_template"] = chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        tokenizer = load_tokenizer(folder)
        assert tokenizer.adds_bos == adds_bos
        return tokenizer, folder

    return make


@pytest.fixture(scope="module")
def plain(make) -> Tokenizer:
    return make()[0]


def document(example: Example, template: str, tokenizer: Tokenizer, **options: bool) -> Document:
    """The document of an example that is one."""
    [made] = documents(example, template, tokenizer, **options)
    return made


def shown(example: Document, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The stretches of text of a document, each learned or not."""
    stretches: list[tuple[list[int], bool]] = []
    for id, trained in zip(example.ids, example.trained, strict=True):
        if not stretches or stretches[-1][1] != trained:
            stretches.append(([], trained))
        stretches[-1][0].append(id)
    return [(tokenizer.decode(ids, skip_special=False), trained) for ids, trained in stretches]


def asked_for(example: Document) -> list[int]:
    """The ids before the first one learned."""
    return example.ids[: example.trained.index(True)]


TALK = Chat(
    (
        Turn("user", "Hi there", False),
        Turn("assistant", "Hello!", True),
        Turn("user", "2+2?", False),
        Turn("assistant", "It is 4.", True),
    )
)
BRIEFED = Chat((Turn("system", "Be brief.", False), *TALK.turns))

# ---- hand-written ids and marks


@pytest.mark.parametrize(
    ("example", "template", "stretches"),
    [
        (
            Instruction("Add.", "2 2", "4"),
            "auto",
            [("<s>### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n", False), ("4</s>", True)],
        ),
        (
            Instruction("Add.", "", "4"),
            "alpaca",
            [("<s>### Instruction:\nAdd.\n\n### Response:\n", False), ("4</s>", True)],
        ),
        (Completion("2+2=", "4"), "auto", [("<s>2+2=", False), ("4</s>", True)]),
        (Completion("", "4 is all"), "auto", [("<s>", False), ("4 is all</s>", True)]),
        (Text("All of it."), "auto", [("<s>", False), ("All of it.</s>", True)]),
        (
            BRIEFED,
            "alpaca",
            [
                ("<s>Be brief.\n\n### Instruction:\nHi there\n\n### Response:\n", False),
                ("Hello!</s>", True),
                ("\n\n### Instruction:\n2+2?\n\n### Response:\n", False),
                ("It is 4.</s>", True),
            ],
        ),
    ],
)
def test_what_is_learned(plain, example, template, stretches):
    made = document(example, template, plain)
    assert shown(made, plain) == stretches
    assert made.ids.count(plain.bos_id) == 1
    everything = document(example, template, plain, train_on_prompt=True)
    assert everything.ids == made.ids
    assert everything.trained == [False] + [True] * (len(made.ids) - 1)


def test_ids_are_those_of_the_whole_text_where_no_token_crosses_the_seam(plain):
    made = document(Instruction("Give the order as JSON.", "2 red chairs", '{"count": 2}'), "auto", plain)
    prompt = "### Instruction:\nGive the order as JSON.\n\n### Input:\n2 red chairs\n\n### Response:\n"
    assert made.ids == [plain.bos_id, *plain.encode(prompt + '{"count": 2}'), plain.eos_id]


@pytest.mark.parametrize(
    ("name", "stretches"),
    [
        (
            "chatml",
            [
                ("<s><|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", False),
                ("Hello!<|im_end|>", True),
                ("\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False),
                ("It is 4.<|im_end|>", True),
                ("\n", False),
            ],
        ),
        (
            "llama3",
            [
                ("<s><|im_start|>user\n\nHi there<|im_end|><|im_start|>assistant\n\n", False),
                ("Hello!<|im_end|>", True),
                ("<|im_start|>user\n\n2+2?<|im_end|><|im_start|>assistant\n\n", False),
                ("It is 4.<|im_end|>", True),
            ],
        ),
        (
            "llama2",
            [
                ("<s>[INST] Hi there [/INST]", False),
                (" Hello! </s>", True),
                ("<s>[INST] 2+2? [/INST]", False),
                (" It is 4. </s>", True),
            ],
        ),
        (
            "vicuna",  # it closes no answer: only the last can be given an end without changing what is in between
            [
                ("<s>USER: Hi there\nASSISTANT:", False),
                (" Hello!", True),
                ("\nUSER: 2+2?\nASSISTANT:", False),
                (" It is 4.</s>", True),
            ],
        ),
    ],
)
def test_what_is_learned_of_a_chat(make, name, stretches):
    tokenizer, _ = make(TEMPLATES[name])
    assert shown(document(TALK, "auto", tokenizer), tokenizer) == stretches
    # A turn that is not to be learned stays, unlearned.
    first, answer, *rest = TALK.turns
    made = document(Chat((first, replace(answer, train=False), *rest)), "auto", tokenizer)
    assert made.ids == document(TALK, "auto", tokenizer).ids
    assert [text for text, trained in shown(made, tokenizer) if trained] == [stretches[3][0]]


# ---- transformers as the reference


def chats() -> list[Chat]:
    everyday = [TALK, BRIEFED, Chat((Turn("user", " 你好\n\n", False), Turn("assistant", "<b>é & ü</b> \n", True)))]
    if not DATA.is_dir():
        return everyday
    sets = [list(read(DATA / name)) for name in ("glaive_toolcall_en_demo.json", "v1_sft_demo.jsonl")]
    return everyday + [chat for rows in sets for chat in rows[:60]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_as_transformers_renders_them(make, name):
    tokenizer, folder = make(TEMPLATES[name])
    reference = AutoTokenizer.from_pretrained(folder)
    compared = refused = 0
    for chat in chats():
        messages = [{"role": turn.role, "content": turn.text or turn.written} for turn in chat.turns]
        tools = json.loads(chat.tools) if chat.tools else None
        try:
            whole = reference.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception as error:
            assert "roles must alternate" in str(error)
            with pytest.raises(RowError, match="roles must alternate"):
                document(chat, "auto", tokenizer)
            refused += 1
            continue
        asked = reference.apply_chat_template(messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True)
        all_of_it, before = View(len(messages)), View(len(messages) - 1, ask=True)
        assert rendered(chat, [all_of_it, before], tokenizer) == {all_of_it: whole, before: asked}

        made = document(chat, "auto", tokenizer)
        bos = "" if whole.startswith("<s>") else "<s>"
        ends = "</s>" if name == "vicuna" else ""
        text = tokenizer.decode(made.ids, skip_special=False)
        assert text.rstrip() == bos + whole.rstrip() + ends
        first = next(number for number, turn in enumerate(chat.turns) if turn.train)
        asked = reference.apply_chat_template(messages[:first], tools=tools, tokenize=True, add_generation_prompt=True)
        assert asked_for(made) == [tokenizer.bos_id] * bool(bos) + asked["input_ids"]
        compared += 1
    assert compared >= 3
    assert refused == 0 or name == "llama2"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_document_begins_with_one_bos(make, name, adds_bos):
    tokenizer, _ = make(TEMPLATES[name], adds_bos)
    made = document(Chat(TALK.turns[:2]), "auto", tokenizer)
    wanted = adds_bos or name in ("llama2", "llama3")
    assert made.ids.count(tokenizer.bos_id) == wanted
    assert (made.ids[0] == tokenizer.bos_id) == wanted
    # The template's own bos, put before by hand as well, would be the second.
    asked = View(1, ask=True)
    doubled = [tokenizer.bos_id, *tokenizer.encode(rendered(TALK, [asked], tokenizer)[asked])]
    assert (doubled.count(tokenizer.bos_id) == 2) == (name in ("llama2", "llama3"))


# ---- a prompt is what the model is asked


EXAMPLES: list[tuple[Example, str]] = [
    (Instruction("Add.", "2 2", "4"), "auto"),
    (Instruction("Add.", "2 2", "4"), "chat"),
    (Instruction("Add.", "", "\n\n4"), "auto"),
    (Completion("2+2 =", "= 4"), "auto"),
    (Completion("", "4"), "auto"),
    (TALK, "auto"),
    (BRIEFED, "alpaca"),
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("example", "template"), EXAMPLES)
def test_prompts_have_the_ids_of_training(make, name, example, template):
    if name == "vicuna" and example is BRIEFED:
        return
    tokenizer, _ = make(TEMPLATES[name])
    assert prompt_ids(example, template, tokenizer) == asked_for(document(example, template, tokenizer))


@pytest.mark.parametrize("template", ["auto", "alpaca", "chat"])
@pytest.mark.parametrize("input_", ["", "2 2"])
def test_instructions_are_asked_as_they_were_learned(make, template, input_):
    tokenizer, _ = make(CHATML)
    learned = asked_for(document(Instruction("Add.", input_, "4"), template, tokenizer))
    assert instruction_ids("Add.", input_, template, tokenizer) == learned


def test_a_chat_of_an_instruction_asks_both(make):
    tokenizer, _ = make(CHATML)
    made = document(Instruction("Add.", "2 2", "4"), "chat", tokenizer)
    prompt = "<s><|im_start|>user\nAdd.\n\n2 2<|im_end|>\n<|im_start|>assistant\n"
    assert shown(made, tokenizer) == [(prompt, False), ("4<|im_end|>", True), ("\n", False)]


def test_the_only_answer():
    assert only_answer(Instruction("Add.", "", "4")) == "4"
    assert only_answer(Completion("2+2=", "4")) == "4"
    assert only_answer(Chat(TALK.turns[:2])) == "Hello!"
    assert only_answer(TALK) is None
    assert only_answer(Text("all of it")) is None


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_many_examples_give_what_each_gives(make, train_on_prompt):
    """In one call of the tokenizer, whatever their kinds; an error stands in the place of its example."""
    tokenizer, _ = make(FORGETFUL)
    thoughtful = Chat((TALK.turns[0], replace(TALK.turns[1], text="<think>hm</think>Hello!"), *TALK.turns[2:]))
    examples = [example for example, _ in EXAMPLES]
    examples += [thoughtful, Text("<s>"), Text("a"), replace(TALK, turns=(TALK.turns[0],)), *examples]
    made = templates.documents_of(examples, "auto", tokenizer, train_on_prompt)
    refused = 0
    for example, found in zip(examples, made, strict=True):
        try:
            assert found == documents(example, "auto", tokenizer, train_on_prompt)
        except RowError as error:
            assert str(found) == str(error)
            refused += 1
    assert refused == 2  # the bos, and: nothing to learn; or with prompts: a prompt that would be learned twice
    assert templates.documents_of([], "auto", tokenizer) == []


def test_an_instruction_with_a_history_is_a_chat_in_either_template(make):
    example = Instruction("2+2?", "", "It is 4.", "Be brief.", (("Hi there", "Hello!"),))
    tokenizer, _ = make(CHATML)
    assert documents(example, "chat", tokenizer) == documents(BRIEFED, "chat", tokenizer)
    assert documents(example, "auto", tokenizer) == documents(BRIEFED, "alpaca", tokenizer)


# ---- tokens that would reach over a seam


@pytest.fixture(scope="module")
def merging(tmp_path_factory) -> Tokenizer:
    """A tokenizer that makes one token of "ow", wherever its letters come from."""
    letters = [*"ohw !abc", "ow"]
    engine = Engine(models.BPE({letter: id for id, letter in enumerate(["</s>", *letters])}, [("o", "w")]))
    engine.decoder = decoders.Fuse()
    engine.add_special_tokens(["</s>"])
    folder = tmp_path_factory.mktemp("merging")
    engine.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return load_tokenizer(folder)


def test_no_token_reaches_over_the_seam(merging):
    prompt, answer = "hello".replace("e", "a").replace("l", "b"), "wow!"
    made = document(Completion(prompt, answer), "auto", merging)
    whole = merging.encode(prompt + answer)
    assert whole[: len(merging.encode(prompt))] != merging.encode(prompt)  # a mask over these ids would be off by one
    assert made.ids == [*merging.encode(prompt), *merging.encode(answer), merging.eos_id]
    assert made.trained == [False] * len(prompt) + [True] * 4  # w, ow, !, </s>
    assert len(made.ids) == len(prompt) + 4 != len(whole) + 1


def test_an_answer_whose_seam_a_token_would_reach_over_has_a_document_of_its_own(merging):
    tokenizer = replace(merging, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    chat = Chat(
        tuple(
            Turn("user" if i % 2 == 0 else "assistant", text, i % 2 == 1)
            for i, text in enumerate(["cao", "wow", "a ow", "oh"])
        )
    )
    whole, first = documents(chat, "auto", tokenizer)
    assert whole.ids == [*tokenizer.encode("caowowa owoh"), tokenizer.eos_id]
    assert shown(whole, tokenizer) == [("caowowa ow", False), ("oh</s>", True)]
    assert first.ids == tokenizer.encode("cao") + tokenizer.encode("wow")
    assert shown(first, tokenizer) == [("cao", False), ("wow", True)]


@real_data
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("alpaca_en_demo.json", {}),
        ("alpaca_zh_demo.json", {}),
        ("gsm8k_test.jsonl", {"question": "instruction", "answer": "output"}),
        ("v1_sft_demo.jsonl", {}),
        ("glaive_toolcall_en_demo.json", {}),
        ("c4_demo.jsonl", {}),
        ("wiki_demo.txt", {}),
    ],
)
def test_real_rows_come_back_whole(make, name, columns):
    """Text back from ids: all of it, its answers learned and nothing else, one bos, a learned end."""
    tokenizer, _ = make(CHATML)
    for example in list(read(DATA / name, "auto", columns))[:150]:
        made = document(example, "auto", tokenizer)
        stretches = shown(made, tokenizer)
        learned = [text for text, trained in stretches if trained]
        match example:
            case Instruction(output=output):
                assert learned == [f"{output}</s>"]
                prompt = templates.alpaca_prompt(example.instruction, example.input)
                assert made.ids[: len(asked_for(made))] == [tokenizer.bos_id, *tokenizer.encode(prompt)]
            case Chat(turns=turns):
                assert learned == [f"{turn.text or turn.written}<|im_end|>" for turn in turns if turn.train]
            case Text(text=text):
                assert learned == [f"{text}</s>"]
        assert made.ids[0] == tokenizer.bos_id
        assert made.ids.count(tokenizer.bos_id) == 1


def llama2(folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes((DATA / "llama2_tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return load_tokenizer(folder)


@real_data
def test_no_space_is_put_before_what_goes_on(tmp_path):
    """Sentencepiece puts a space before a text: right at its beginning, wrong at every seam."""
    tokenizer = llama2(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hel") + tokenizer.encode("lo")) != "hello"

    made = document(Completion("hel", "lo"), "auto", tokenizer)
    assert tokenizer.encode("hello")[:1] != tokenizer.encode("hel")[:1]
    assert tokenizer.decode(made.ids) == "hello"
    assert asked_for(made) == [tokenizer.bos_id, *tokenizer.encode("hel")]

    made = document(TALK, "alpaca", tokenizer)
    prompts = (f"### Instruction:\n{turn.text}\n\n### Response:\n" for turn in TALK.turns[::2])
    text = "{}Hello!</s>\n\n{}It is 4.</s>".format(*prompts)
    assert tokenizer.decode(made.ids, skip_special=False).removeprefix("<s>").lstrip() == text


@real_data
@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json", "gsm8k_test.jsonl"])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_continuation_has_the_ids_of_the_whole_where_nothing_merges(make, tmp_path, kind, name):
    """An answer is encoded by itself; this is what it would be in one text with its prompt, unless a token of that
    reaches over the seam."""
    tokenizer = make()[0] if kind == "byte-level" else llama2(tmp_path)
    columns = {"question": "instruction", "answer": "output"} if name.startswith("gsm8k") else {}
    examples = list(read(DATA / name, "auto", columns))[:300]
    same = 0
    for example in examples:
        prompt = templates.alpaca_prompt(example.instruction, example.input)
        whole = tokenizer.encode(prompt + example.output)
        made = document(example, "auto", tokenizer)
        seamless = whole[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)
        assert (made.ids == [tokenizer.bos_id, *whole, tokenizer.eos_id]) == seamless
        same += seamless
    assert same > 0.95 * len(examples)


# ---- what is refused


def test_a_bos_in_a_row_is_refused(make):
    tokenizer, _ = make(CHATML)
    for example in (
        Instruction("a <s> b", "", "c"),
        Instruction("a", "<s>", "c"),
        Completion("a", "b<s>"),
        Text("<s>a"),
        Chat((Turn("user", "<s>", False), Turn("assistant", "b", True))),
    ):
        where = "turn 1" if isinstance(example, Chat) else "its text"
        with pytest.raises(RowError, match=f"{where} holds '<s>'"):
            document(example, "auto", tokenizer)
    with pytest.raises(UserError, match="cannot be asked: its text holds '<s>'"):
        instruction_ids("<s>", "", "auto", tokenizer)


def test_an_end_that_is_written_already_is_not_doubled(plain):
    made = document(Completion("2+2=", "4</s>"), "auto", plain)
    assert made.ids.count(plain.eos_id) == 1
    assert made.trained[-1]


def test_a_template_that_rewrites_earlier_turns_makes_a_document_of_each_answer(make):
    tokenizer, _ = make(FORGETFUL)
    thoughtful = replace(TALK.turns[1], text="<think>hm</think>Hello!")
    chat = Chat((TALK.turns[0], thoughtful, *TALK.turns[2:]))
    first, last = documents(chat, "auto", tokenizer)
    assert first == document(Chat(chat.turns[:2]), "auto", tokenizer)
    assert shown(first, tokenizer)[1] == ("<think>hm</think>Hello!<|im_end|>", True)
    forgotten = "<s><|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    assert shown(last, tokenizer) == [
        (f"{forgotten}<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is 4.<|im_end|>", True),
        ("\n", False),
    ]
    with pytest.raises(RowError, match=r"data.train_on_prompt would learn some turns several times"):
        documents(chat, "auto", tokenizer, train_on_prompt=True)
    # without thoughts it is as good as any
    assert document(TALK, "auto", tokenizer) == document(TALK, "auto", make(CHATML)[0])


def test_a_template_that_leaves_out_the_answer_is_refused(make):
    tokenizer, _ = make("{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}\n{% endfor %}")
    with pytest.raises(RowError, match="turn 2 is left out by the chat template"):
        document(TALK, "auto", tokenizer)


def test_nothing_to_learn_is_refused(make):
    tokenizer, _ = make(CHATML)
    with pytest.raises(RowError, match="nothing to learn"):
        document(Chat((TALK.turns[0], replace(TALK.turns[1], train=False))), "auto", tokenizer)
    unbegun = replace(tokenizer, adds_bos=False)
    with pytest.raises(RowError, match="nothing to learn"):
        document(Text("</s>"), "auto", unbegun)  # one token, and nothing to predict it from


def test_the_alpaca_template_refuses_tools(plain):
    called = Chat((*TALK.turns[:2], Turn("tool", "4", False), Turn("assistant", "Four.", True)))
    for chat in (called, replace(TALK, tools="[{}]")):
        with pytest.raises(RowError, match="it uses tools, for which the alpaca template has no place"):
            document(chat, "alpaca", plain)


def test_a_tokenizer_without_a_chat_template_says_what_to_set(plain):
    for example, template in ((TALK, "auto"), (TALK, "chat"), (Instruction("a", "", "b"), "chat")):
        with pytest.raises(UserError, match=r'no chat template for conversations; set data.template = "alpaca"'):
            document(example, template, plain)


PROMPT_AND_MORE = "{{ messages[0]['content'] }}{% if add_generation_prompt %}{{ 'b' }}{% else %}{{ 'c' }}{% endif %}"


def test_a_template_that_asks_otherwise_than_it_answers_is_refused(plain):
    with pytest.raises(RowError, match="turn 2 is not begun by the chat template as it asks for it"):
        document(Chat(TALK.turns[:2]), "auto", replace(plain, chat_template=PROMPT_AND_MORE))


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__['os'].system('true') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ no_such_function() }}",
    ],
)
def test_chat_templates_run_in_a_sandbox(plain, attack):
    with pytest.raises((RowError, UserError), match=r"chat template (refuses it|tries what no chat template may)"):
        document(TALK, "auto", replace(plain, chat_template=attack))


def test_a_broken_chat_template_is_the_tokenizers_fault(plain):
    with pytest.raises(UserError, match="chat template has an error in line 2"):
        document(TALK, "auto", replace(plain, chat_template="a\n{% for %}"))


def test_a_row_at_the_parsers_depth_is_no_crash():
    """Of JSON that could just be read some cannot be looked through, or written down again: the row is a bad one."""
    tokenizer, limit, reasons = load_tokenizer(TINY), sys.getrecursionlimit(), set()
    for depth in range(limit - 120, limit - 10):
        deep = '{"a":' * depth + "1" + "}" * depth
        called = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": deep}]}
        row = {"messages": [{"role": "user", "content": "?"}, called]}
        try:
            documents(parse(row, "messages"), "chat", tokenizer)
        except RowError as error:
            reasons.add(error.reason[:25])
    assert {"it is too deeply nested", "is not readable JSON: max"} <= reasons
