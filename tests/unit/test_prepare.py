"""From a recipe's files to two corpora: what is counted, held out, dropped, refused."""

import hashlib
import json
import math
import re
import string
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, processors

from minitune import data
from minitune.config import DataConfig
from minitune.data import Prepared, checks, prepare
from minitune.data.corpus import Corpus
from minitune.data.fates import firsts, held_out, repeated
from minitune.data.formats import Instruction, Text
from minitune.data.objects import TWICE
from minitune.data.tokenise import content_hash
from minitune.errors import UserError
from minitune.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")

QUESTIONS = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(1, 61)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Every byte a token, with a bos and an eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Engine(models.BPE({text: id for id, text in enumerate(["<s>", "</s>", *alphabet])}, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(["<s>", "</s>"])
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("bytes")
    engine.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return load_tokenizer(folder)


@pytest.fixture
def jsonl(tmp_path):
    def write(rows: list, name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def recipe(*train: str, **more: object) -> DataConfig:
    return replace(DataConfig(train=train, max_seq_len=4096), **more)


def documents(corpus: Corpus | None) -> list[tuple[int, ...]]:
    return [] if corpus is None else [tuple(corpus[number][0].tolist()) for number in range(len(corpus))]


def accounted(prepared: Prepared) -> int:
    names = ("skipped", "duplicates", "overlap", "dropped", "train_documents", "eval_documents")
    return sum(prepared.counts[name] for name in names)


# ---- the whole way


def test_every_row_is_in_one_count(jsonl, tokenizer):
    rows = [
        *QUESTIONS,
        QUESTIONS[3],
        QUESTIONS[3],
        {"instruction": "?"},
        '{"',
        {"instruction": "x" * 9000, "output": "y"},
    ]
    path = jsonl(rows)
    got = prepare(recipe(path, bad_rows="skip"), tokenizer)
    assert got.counts["rows"] == len(rows) == accounted(got)
    assert [got.counts[name] for name in ("skipped", "duplicates", "dropped")] == [2, 2, 1]
    assert [(row["file"], row["line"], row["fate"], row["reason"]) for row in got.left_out()] == [
        (path, 61, "duplicate", f"the same as {path}:4"),
        (path, 62, "duplicate", f"the same as {path}:4"),
        (path, 63, "bad", "output is missing; there is instruction"),
        (path, 64, "bad", "not valid JSON at column 2: Unterminated string starting at"),
        (path, 65, "dropped", "9036 tokens, too long"),
    ]
    assert got.warnings == ["2 of 65 rows cannot be used and are skipped"]
    assert got.counts["tokens"] == sum(len(ids) for ids in documents(got.train))
    answers = sum(len(row["output"]) + 1 for row in QUESTIONS)  # its bytes, and eos
    assert got.counts["trained_tokens"] + got.eval.trained_tokens == answers
    assert got.digests == {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    assert prepare(recipe(path, bad_rows="skip", deduplicate=False), tokenizer).counts["duplicates"] == 0


def test_a_row_may_make_hundreds_of_documents(jsonl, tokenizer):
    forgetful = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ '</s>' if loop.last else '~' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(260) for role in ("user", "assistant")]
    cfg = recipe(jsonl([{"messages": turns}]), max_seq_len=2**15, eval_fraction=0.0)
    prepared = prepare(cfg, replace(tokenizer, chat_template=forgetful))
    assert (prepared.counts["rows"], prepared.counts["train_documents"]) == (1, 260)


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("  Write a  poem about", "write a"),
        ("Translate:\n\nthis text", "translate: this"),
        ("Sum", "sum"),
        ("대한민국의 수도는 어디입니까", "대한민국의 수도는"),  # Korean has spaces
        ("请把下面这句话翻译成英文。", "请把"),
        ("翻译\uff1a早上好", "翻译"),
        ("用Python写一个程序", "用"),
        ("Python 写一个程序", "python 写一"),
        ("「翻訳してください", "「翻訳"),
        ("ガラスについて", "ガラ"),
        ("カ\u3099ラスについて", "カ\u3099ラ"),  # the same, its accent a mark of its own
        ("เขียนบทกวีเกี่ยวกับทะเล", "เขียน"),
        ("ខ្ញុំចង់ទៅសាលារៀន", "ខ្ញុំចង់"),
        ("", "(empty)"),
    ],
)
def test_rows_are_counted_by_their_first_words_in_any_script(jsonl, tokenizer, text, category):
    rows = [{"instruction": text, "output": "yes"}, *QUESTIONS]
    assert prepare(recipe(jsonl(rows), columns={}), tokenizer).store.categories[0] == category


def test_rows_in_chinese_fall_into_few_categories(tokenizer):
    if not (path := DATA / "alpaca_zh_demo.json").exists():
        pytest.skip("the data sets are not there")
    store = prepare(recipe(str(path), columns={}), tokenizer).store
    assert len(store.categories) < 400 < 990 < len({row["instruction"] for row in json.loads(path.read_text())})


def test_values_of_a_category_column_are_named_as_json_writes_them(jsonl, tokenizer):
    values = [None, True, 2.5, ["a", "模"], {"k": "\x1b"}, "", " \n", "null", 10**30]
    rows = [{"instruction": f"{n}", "output": "y", "kind": value} for n, value in enumerate(values)]
    names = ["(none)", "true", "2.5", '["a", "模"]', r'{"k": "\u001b"}', "(empty)", "null", str(10**30)]
    got = prepare(recipe(jsonl(rows), category="kind"), tokenizer)
    assert got.store.categories == names and not any("data.category" in warning for warning in got.warnings)
    nothing = [{"instruction": "", "output": "y"}]
    assert prepare(recipe(jsonl(nothing)), tokenizer).store.categories == ["(empty)"]
    got = prepare(recipe(jsonl(rows), category="knid\x1b"), tokenizer)
    assert r"data.category: no row has anything in a column knid\u{1b}" in got.warnings


def test_of_no_rows_only_that_is_said(tmp_path, tokenizer):
    for name, content in (("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.txt", "")):
        (tmp_path / name).write_text(content)
        got = prepare(recipe(str(tmp_path / name)), tokenizer, refuse=False)
        assert (got.warnings, got.counts["rows"]) == (["data: the files hold no rows"], 0)


def test_a_category_may_hold_half_a_surrogate_pair(jsonl, tokenizer):
    rows = [row | {"kind": "\ud800x"} for row in QUESTIONS]
    assert prepare(recipe(jsonl(rows), category="kind"), tokenizer).store.categories == [r"\ud800x"]


def test_documents_keep_the_order_and_the_tokens_of_the_rows(jsonl, tokenizer):
    got = prepare(recipe(jsonl(QUESTIONS), eval_fraction=0.0), tokenizer)
    assert got.eval is None
    expected = [f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}" for row in QUESTIONS]
    assert [tokenizer.decode(list(ids)) for ids in documents(got.train)] == expected
    assert [tokenizer.decode(got.train[n][0][got.train[n][1]].tolist()) for n in (0, 59)] == [
        QUESTIONS[0]["output"],
        QUESTIONS[59]["output"],
    ]


def test_samples_are_held_out_prompts_with_one_answer(jsonl, tokenizer):
    got = prepare(recipe(jsonl(QUESTIONS), eval_fraction=0.5), tokenizer, samples=4)
    held = documents(got.eval)
    assert len(got.samples) == 4
    for sample, ids in zip(got.samples, held, strict=False):
        assert tuple(sample.prompt_ids) == ids[: len(sample.prompt_ids)]
        assert tokenizer.decode(list(ids)) == sample.prompt_text + sample.answer
    assert not prepare(recipe(jsonl([{"text": "a"}, {"text": "b"}]), eval_fraction=0.5), tokenizer, 4).samples


# ---- what is held out


def split(rows: list[dict], fraction: float = 0.2) -> tuple[set[str], set[str]]:
    asked = np.array([row["instruction"] for row in rows])
    hashes = [content_hash(Instruction(row["instruction"], "", row["output"])) for row in rows]
    held = held_out(np.array(hashes, np.uint64), fraction)
    return set(asked[~held].tolist()), set(asked[held].tolist())


def test_rows_stay_on_their_side():
    train, held = split(QUESTIONS)
    assert train | held == {row["instruction"] for row in QUESTIONS}
    assert not train & held
    assert 4 <= len(held) <= 22  # of 60, at 0.2
    for rows in (QUESTIONS[::-1], QUESTIONS[:30], QUESTIONS[7:50]):
        some_train, some_held = split(rows)
        assert some_train <= train
        assert some_held <= held
    wider = split(QUESTIONS, 0.5)
    assert held < wider[1]
    # The mutant: a split by place moves rows as soon as others are put before them.
    assert {row["instruction"] for row in QUESTIONS[:12]} != {row["instruction"] for row in QUESTIONS[::-1][:12]}


def test_equal_rows_are_on_one_side():
    doubled = [*QUESTIONS, *({**row, "output": row["output"] + " \n"} for row in QUESTIONS)]
    train, held = split(doubled)
    assert not train & held
    assert content_hash(Text("a  b\u00e9")) == content_hash(Text("a\nbe\u0301 "))
    assert content_hash(Text("a b")) != content_hash(Text("ab"))
    assert content_hash(Instruction("a", "b", "c")) != content_hash(Instruction("a b", "", "c"))


def test_neither_side_is_empty_where_two_rows_differ():
    for fraction in (1e-9, 0.999999999):
        train, held = split(QUESTIONS[:2], fraction)
        assert len(train) == len(held) == 1
    assert split(QUESTIONS[:1], 0.5) == ({"Count to 1."}, set())
    assert split([QUESTIONS[0]] * 3, 0.5) == ({"Count to 1."}, set())
    assert split(QUESTIONS, 0.0)[1] == set()


def test_all_rows_the_same_hold_nothing_out(jsonl, tokenizer):
    got = prepare(recipe(jsonl([QUESTIONS[0]] * 3)), tokenizer)
    assert got.eval is None
    assert got.warnings == ["no rows are held out, as all are the same"]


def test_rows_of_data_eval_are_not_trained_on(jsonl, tokenizer):
    again = [QUESTIONS[35] | {"output": f" {QUESTIONS[35]['output']}\n"}, *QUESTIONS[36:]]  # but for white space
    train, held = jsonl(QUESTIONS[:40]), jsonl(again, "eval.jsonl")
    got = prepare(recipe(train, eval=(held,)), tokenizer)
    assert (got.counts["train_documents"], got.counts["eval_documents"], got.counts["overlap"]) == (35, 25, 5)
    assert got.counts["rows"] == accounted(got) == 65
    assert not set(documents(got.train)) & set(documents(got.eval))
    assert [row["line"] for row in got.left_out() if row["fate"] == "overlap"] == [36, 37, 38, 39, 40]
    assert set(got.digests) == {train, held}
    assert got.warnings == ["5 rows of data.train are in data.eval as well and are not trained on"]
    assert prepare(recipe(train), tokenizer).counts["overlap"] == 0

    kept = prepare(recipe(train, eval=(held,), deduplicate=False), tokenizer)  # the control
    assert (kept.counts["train_documents"], kept.counts["overlap"]) == (40, 5)
    assert set(documents(kept.train)) & set(documents(kept.eval))
    assert kept.warnings == ["5 rows of data.train are in data.eval as well and are trained on all the same"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40))
def test_firsts_are_where_a_list_finds_them(keys):
    assert firsts(np.array(keys, np.uint64)).tolist() == [keys.index(key) for key in keys]


def test_near_duplicates_are_reported_or_removed(jsonl, tokenizer):
    said = [
        f"{n}: " + " ".join(hashlib.sha256(f"{n} {k}".encode()).hexdigest()[:6] for k in range(30)) for n in range(40)
    ]
    rows = [{"instruction": text, "output": text[::-1]} for text in said]
    near = [{"instruction": row["instruction"] + "!", "output": row["output"]} for row in rows[:12]]
    path = jsonl([*rows, *near])
    found = {
        what: prepare(recipe(path, near_duplicates=what, eval_fraction=0.3), tokenizer)
        for what in ("report", "remove", "off")
    }
    assert [got.counts["near_duplicates"] for got in found.values()] == [12, 12, 0]
    kept = [got.counts["train_documents"] + got.counts["eval_documents"] for got in found.values()]
    assert kept == [52, 40, 52]
    assert [(row["line"], row["fate"], row["reason"]) for row in found["remove"].left_out()] == [
        (41 + n, "near_duplicate", f"nearly the same as {path}:{1 + n}") for n in range(12)
    ]
    assert found["report"].fates.twin[40:].tolist() == list(range(12))

    def straddling(got: Prepared) -> int:
        """Near duplicates of which one is trained on and one held out."""
        held = set(got.eval_entries.tolist())
        used = held | set(got.train_entries.tolist())
        return sum((n in held) != (40 + n in held) for n in range(12) if {n, 40 + n} <= used)

    assert straddling(found["remove"]) == 0 < straddling(found["report"])


def test_near_duplicates_of_data_eval_are_not_trained_on_on_request(jsonl, tokenizer):
    said = [" ".join(hashlib.sha256(f"{n} {k}".encode()).hexdigest()[:6] for k in range(30)) for n in range(20)]
    rows = [{"instruction": text, "output": text[::-1]} for text in said]
    held = jsonl([{**row, "instruction": row["instruction"] + "?"} for row in rows[:5]], "eval.jsonl")
    got = prepare(recipe(jsonl(rows), eval=(held,), near_duplicates="remove"), tokenizer)
    assert (got.counts["train_documents"], got.counts["eval_documents"], got.counts["near_duplicates"]) == (15, 5, 5)
    assert [row["line"] for row in got.left_out()] == [1, 2, 3, 4, 5]


def test_the_rows_left_out_are_written_whole(jsonl, tokenizer, tmp_path):
    got = prepare(recipe(jsonl([*QUESTIONS, QUESTIONS[3], '{"\u00e9'], "é.jsonl"), bad_rows="skip"), tokenizer)
    got.write_left_out(tmp_path / "left_out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()] == [*got.left_out()]
    assert len([*got.left_out()]) == 2


# ---- weights


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 4), st.integers(0, 9))
def test_weights_repeat_documents_exactly(documents, weight, seed):
    entries = np.arange(100, 100 + documents)
    content = np.random.default_rng(seed).integers(0, 2**63, documents).astype(np.uint64)
    got = repeated(entries, content, weight)
    times = np.bincount(got - 100, minlength=documents)
    assert len(got) == round(weight * documents)
    assert set(times.tolist()) <= {math.floor(weight), math.ceil(weight)}
    order = np.random.default_rng(seed).permutation(documents)
    assert repeated(entries, content, weight).tolist() == got.tolist()
    chosen = set(content[got - 100][np.argsort(got)].tolist())
    assert set(content[order][repeated(np.arange(documents), content[order], weight)].tolist()) == chosen


def test_weights_are_by_file(jsonl, tokenizer):
    one, two = jsonl(QUESTIONS[:10]), jsonl(QUESTIONS[10:30], "two.jsonl")
    got = prepare(recipe(one, two, weights=(2.0, 0.5), eval_fraction=0.0), tokenizer)
    assert (got.counts["train_documents"], got.counts["rows"]) == (30, 30)
    plain = prepare(recipe(one, two, eval_fraction=0.0), tokenizer)
    times = Counter(documents(got.train))
    assert [times[ids] for ids in documents(plain.train)[:10]] == [2] * 10
    assert sorted(times[ids] for ids in documents(plain.train)[10:]) == [0] * 10 + [1] * 10
    assert got.counts["tokens"] == sum(len(ids) for ids in documents(got.train))


# ---- rows that are too long


def test_overlong_rows(jsonl, tokenizer):
    rows = [*QUESTIONS[:9], {"instruction": "Count on.", "output": "1 " * 400}]
    path = jsonl(rows)
    dropped = prepare(recipe(path, max_seq_len=200, eval_fraction=0.0, checks="warn"), tokenizer)
    assert (dropped.counts["dropped"], dropped.counts["train_documents"]) == (1, 9)
    [warning] = dropped.warnings
    assert warning.startswith("data: 1 of 10 rows are left out, more than 5%: 1 are too long (raise data.max_seq_len")

    cut = prepare(recipe(path, max_seq_len=200, eval_fraction=0.0, overlong="truncate"), tokenizer)
    whole = prepare(recipe(path, eval_fraction=0.0), tokenizer)
    assert (cut.counts["truncated"], cut.counts["dropped"], cut.warnings) == (1, 0, [])
    assert documents(cut.train) == [ids[:200] for ids in documents(whole.train)]
    exact = len(documents(whole.train)[-1])
    fits = prepare(recipe(path, max_seq_len=exact, eval_fraction=0.0, overlong="error"), tokenizer)
    assert documents(fits.train) == documents(whole.train)
    with pytest.raises(
        UserError, match=rf"1 rows are longer than data.max_seq_len = {exact - 1}.*\n.*:10: {exact} tokens"
    ):
        prepare(recipe(path, max_seq_len=exact - 1, eval_fraction=0.0, overlong="error"), tokenizer)


def test_a_row_cut_before_its_answer_is_dropped(jsonl, tokenizer):
    path = jsonl([*QUESTIONS[:9], {"instruction": "x" * 400, "output": "y"}])
    got = prepare(recipe(path, max_seq_len=200, overlong="truncate", checks="warn"), tokenizer)
    assert (got.counts["truncated"], got.counts["dropped"]) == (0, 1)


def test_nothing_left_is_an_error(jsonl, tokenizer):
    path = jsonl(QUESTIONS)
    with pytest.raises(UserError, match=r"data.train: nothing is left of 60 rows: 60 too long; raise data.max_seq_len"):
        prepare(recipe(path, max_seq_len=10, overlong="truncate", checks="warn"), tokenizer)
    with pytest.raises(UserError, match=r"data.eval: nothing is left of 1 rows: 1 too long"):
        long = jsonl([{"instruction": "x" * 400, "output": "y"}], "eval.jsonl")
        prepare(recipe(path, eval=(long,), max_seq_len=300, checks="warn"), tokenizer)
    with pytest.raises(UserError, match=r"data.train: nothing is left of 60 rows: 60 in data.eval, too"):
        prepare(recipe(path, eval=(jsonl(QUESTIONS, "eval.jsonl"),)), tokenizer)


# ---- data that can hardly be meant


def doubtful(cfg: DataConfig, tokenizer: Tokenizer, words: str) -> None:
    """It is refused, saying which key lets it pass; that key does; and then it is a warning."""
    with pytest.raises(UserError, match=words) as refused:
        prepare(cfg, tokenizer)
    assert str(refused.value).endswith('if it is meant so, set data.checks = "warn"')
    assert any(re.search(words, warning) for warning in prepare(replace(cfg, checks="warn"), tokenizer).warnings)
    assert prepare(cfg, tokenizer, refuse=False).counts


def test_losing_more_than_one_row_in_twenty_is_refused(jsonl, tokenizer):
    long = [{"instruction": f"{n} " + "x" * 9000, "output": "y"} for n in range(4)]
    assert prepare(recipe(jsonl([*QUESTIONS, *long[:3]])), tokenizer).counts["dropped"] == 3
    doubtful(recipe(jsonl([*QUESTIONS, *long])), tokenizer, r"4 of 64 rows are left out, more than 5%: 4 are too long")
    bad = [{"instruction": "?"}] * 4
    rows = jsonl([*QUESTIONS, *bad])
    doubtful(recipe(rows, bad_rows="skip"), tokenizer, r"4 of 64 rows are left out, .* 4 cannot be used")


def test_rows_of_answers_alone_are_refused(jsonl, tokenizer):
    answers = [{"prompt": "", "completion": row["output"] or "0"} for row in QUESTIONS]
    doubtful(recipe(jsonl(answers)), tokenizer, r"every token of the 60 documents is trained, as if")
    assert prepare(recipe(jsonl(answers), train_on_prompt=True), tokenizer).warnings == []
    texts = [{"text": row["completion"]} for row in answers]
    assert prepare(recipe(jsonl(texts)), tokenizer).warnings == []
    answers[7]["prompt"] = "Count to seven: "
    assert prepare(recipe(jsonl(answers)), tokenizer).warnings == []


def test_an_eos_that_is_never_learned_is_refused(jsonl, tokenizer):
    """Of two answers the last alone is closed by an eos, as the template writes none."""
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chatty = replace(tokenizer, chat_template=template + "{% if add_generation_prompt %}assistant: {% endif %}")

    def chats(last: bool) -> str:
        asked = {"role": "user", "content": "a"}
        answers = [{"role": "assistant", "content": "b", "train": True}, {"role": "assistant", "content": "c"}]
        answers[1]["train"] = last
        rows = [{"messages": [asked | {"content": f"a{n}"}, answers[0], asked, answers[1]]} for n in range(9)]
        return jsonl(rows)

    assert prepare(recipe(chats(last=True)), chatty).warnings == []
    doubtful(recipe(chats(last=False)), chatty, r"no document trains the token that ends an answer")


# ---- what is refused


def test_bad_rows_are_listed_together(jsonl, tokenizer):
    train = jsonl([*QUESTIONS[:3], *([{"instruction": "?", "output": ""}] * 12)])
    held = jsonl([{"instruction": "<s>", "output": "y"}], "eval.jsonl")
    with pytest.raises(UserError) as error:
        prepare(recipe(train, eval=(held,)), tokenizer)
    first, *listed, rest = str(error.value).split("\n")
    assert first == '13 rows cannot be used; mend them, or leave them out with data.bad_rows = "skip"'
    empty = [f"  {train}:{number}: output is empty" for number in range(4, 13)]
    assert listed[:9] == [f"{empty[0]} (12 such rows)", *empty[1:]]
    assert listed[9].startswith(f"  {held}:1: its text holds") and len(listed) == 10  # the last of all, and shown
    assert rest == "  and 3 more"
    with pytest.raises(
        UserError, match=rf"data.eval: nothing is left of 1 rows: 1 skipped.*\n  {held}:1: its text holds"
    ):
        prepare(recipe(train, eval=(held,), bad_rows="skip"), tokenizer)


def test_of_many_reasons_the_first_are_shown_and_the_rest_counted(jsonl, tokenizer):
    """Numbers, and what a row itself says, make no reason of its own."""
    roles = [{"messages": [{"role": f"{n} b", "content": "?"}]} for n in range(30)]
    others = [{"messages": [{"role": "user", "content": "?", f"key_{letter}": 1}]} for letter in "abcdefghijkl"]
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    train = jsonl([good, *roles, *others, roles[0]])
    with pytest.raises(UserError) as error:
        prepare(recipe(train, template="alpaca"), tokenizer)
    _, *listed, rest = str(error.value).split("\n")
    assert listed[0].startswith(f"  {train}:2: messages[0].role is '0 b'") and listed[0].endswith(" (31 such rows)")
    for number, letter, line in zip(range(32, 41), "abcdefghi", listed[1:], strict=True):
        assert line.startswith(f"  {train}:{number}: messages[0].key_{letter} ") and "such rows" not in line
    assert rest == "  and 33 more, 3 other reasons among them"


def test_keys_given_twice_are_one_kind_of_bad_row(tmp_path, tokenizer, monkeypatch):
    """However many there are, the other kind is shown among the ten."""
    good = ['{"instruction": "?", "output": "y"}'] * 3
    keys = [f"{letter}\\u001b[2J{letter * 9000}" for letter in string.ascii_lowercase]
    doubled = [f'{{"instruction": "?", "output": "y", "more": {{"{key}": 1, "{key}": 2}}}}' for key in keys]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*good, *doubled, '{"instruction": "?", "output": null}']) + "\n")

    def listed() -> list[str]:
        with pytest.raises(UserError) as error:
            prepare(recipe(str(path)), tokenizer)
        return str(error.value).split("\n")[1:]

    lines = listed()
    assert lines[0].startswith(f"  {path}:4: more.a\\u{{1b}}[2Jaaa") and lines[0].endswith(f"{TWICE} (26 such rows)")
    assert lines[-2:] == [f"  {path}:30: output is null", "  and 17 more"]
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    monkeypatch.setattr(checks, "TWICE", "no reason")  # the mutant
    assert not any("output is null" in line for line in listed())


def test_missing_files_are_named_together(jsonl, tokenizer):
    with pytest.raises(UserError, match=r"name files that are not there: no.jsonl, nor.json$"):
        prepare(recipe("no.jsonl", jsonl(QUESTIONS), eval=("nor.json",)), tokenizer)


def test_an_empty_file_is_refused(jsonl, tokenizer):
    with pytest.raises(UserError, match=r"data.train: .* holds no rows"):
        prepare(recipe(jsonl([])), tokenizer)


def test_tools_that_the_model_never_sees_are_said(jsonl, tokenizer):
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": [{"name": "f"}]}
    blind = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = jsonl([row])
    warned = prepare(recipe(rows, eval_fraction=0.0), replace(tokenizer, chat_template=blind)).warnings
    assert warned == ["some rows list tools, which the tokenizer's chat template does not show to the model"]
    seeing = "{{ tools | tojson if tools }}" + blind
    assert prepare(recipe(rows, eval_fraction=0.0), replace(tokenizer, chat_template=seeing)).warnings == []


# ---- real sets


def test_the_built_in_set(tokenizer):
    got = prepare(recipe("tiny"), tokenizer, samples=20)
    assert set(got.digests) == {"tiny"}
    assert len(got.samples) == 20
    assert 0.05 < got.counts["eval_documents"] / got.counts["rows"] < 0.15
    assert not set(documents(got.train)) & set(documents(got.eval))


@real_data
@pytest.mark.parametrize(
    ("name", "columns"),
    [("gsm8k_test.jsonl", {"question": "instruction", "answer": "output"}), ("alpaca_en_demo.json", {})],
)
def test_real_sets(tokenizer, name, columns):
    got = prepare(recipe(str(DATA / name), columns=columns), tokenizer, samples=3)
    assert got.counts["rows"] == accounted(got)
    assert 0.07 < got.counts["eval_documents"] / got.counts["rows"] < 0.13
    assert not set(documents(got.train)) & set(documents(got.eval))
    assert data.prepare(recipe(str(DATA / name), columns=columns), tokenizer).train.digest == got.train.digest


def test_rows_that_are_equal_once_cut_stay_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"instruction": "q", "output": "b " * n}) + "\n" for n in range(60, 100)))
    for deduplicate in (True, False):
        cfg = recipe(str(path), overlong="truncate", max_seq_len=40, eval_fraction=0.3, deduplicate=deduplicate)
        got = prepare(cfg, tokenizer)
        documents = [{tuple(corpus[i][0]) for i in range(len(corpus))} for corpus in (got.train, got.eval) if corpus]
        assert len(documents) == 1 or not documents[0] & documents[1]
        assert got.counts["overlap"] == 0
        assert got.counts["duplicates"] == (39 if deduplicate else 0)
