"""Texts by their words against the tokenizers library, which takes them whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine

from minitune.data.words import MOST, WORD, Known, Words, words_of
from minitune.pretrained import TINY
from minitune.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")


@pytest.fixture(scope="module", params=["LlamaTokenizer", "legacy"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(DATA / "llama2_tokenizer.model", folder / "tokenizer.model")
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    about |= {"legacy": request.param == "legacy", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return load_tokenizer(folder)


def both(tokenizer: Tokenizer) -> list[tuple[Engine, Words]]:
    found = words_of(tokenizer)
    assert found
    return list(zip((tokenizer.engine, tokenizer.continuation), found, strict=True))


def alone(engine: Engine) -> Words | None:
    """The words of a tokenizer that has this engine alone."""
    found = words_of(replace(load_tokenizer(TINY), engine=engine, continuation=engine))
    return found and found[1]


PIECES = [
    " ",
    "  ",
    "▁",
    "\n",
    "\t",
    "a",
    "the",
    "Hello",
    "ing",
    "12",
    "é",
    "模型",
    "😀",
    "\u2028",
    "\0",
    "</s>",
    "<",
    "s>",
]


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join))
@example("")
@example(" ")
@example("   a   ")
@example("<|pad|> a<|pad|>b")
def test_any_text_has_the_engines_ids(tokenizer: Tokenizer, text: str) -> None:
    for engine, words in both(tokenizer):
        assert words.encode(text) == engine.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "alpaca_zh_demo.json", "wiki_demo.txt", "v1_sft_demo.jsonl"])
def test_real_texts_have_the_engines_ids(tokenizer: Tokenizer, name: str) -> None:
    text = (DATA / name).read_text(encoding="utf-8")[:300_000]
    texts = [*text.splitlines(), text.replace("\\n", "\n")[:50_000]]
    for engine, words in both(tokenizer):
        expected = [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]
        assert [words.encode(text) for text in texts] == expected
        assert 0 < len(words.known) <= MOST


def with_piece(tokenizer: Tokenizer, left: str, right: str) -> Engine:
    """The engine with one more piece and the merge that makes it, the first of all."""
    state = json.loads(tokenizer.continuation.to_str())
    state["model"]["vocab"][left + right] = 32_500
    state["model"]["merges"].insert(0, [left, right])
    return Engine.from_str(json.dumps(state))


def test_a_piece_that_reaches_over_a_space_is_seen(tokenizer: Tokenizer) -> None:
    """It makes words depend on one another: the engine is not taken by its words, and would give other ids if it
    were."""
    other = with_piece(tokenizer, "e", "▁")
    assert alone(other) is None
    text = "the lamp"
    assert Words(other, Known(other.model, WORD)).encode(text) != other.encode(text, add_special_tokens=False).ids
    harmless = with_piece(tokenizer, "▁▁", "q")
    assert alone(harmless).encode("a  q") == harmless.encode("a  q", add_special_tokens=False).ids


def test_words_are_cut_where_no_piece_joins(tokenizer: Tokenizer) -> None:
    """Digits, line ends and characters that are no piece; a vocabulary that has one of them in a longer piece is cut
    elsewhere, and one that could merge the bytes of such a character is not cut at all."""
    engine = tokenizer.continuation
    plain, text = alone(engine), "▁lamp2x\n\ny\u200bz"
    assert plain.known.parts.findall(text) == ["▁lamp", "2", "x", "\n\n", "y", "\u200b", "z"]
    for left, right, cut in (("x", "<0x0A>", [text]), ("p", "2", ["▁lamp2x", "\n\n", "y", "\u200b", "z"])):
        other = with_piece(tokenizer, left, right)
        words, expected = alone(other), other.encode(text, add_special_tokens=False).ids
        assert words.known.parts.findall(text) == cut
        assert words.encode(text) == expected != engine.encode(text, add_special_tokens=False).ids
        words.known.clear()
        words.known.parts = plain.known.parts  # the mutant
        assert words.encode(text) != expected


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", {"byte_fallback": False}),
        ("model", {"dropout": 0.1}),
        ("model", {"ignore_merges": True}),
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}),
    ],
)
def test_other_engines_are_left_whole(tokenizer: Tokenizer, part: str, change: dict[str, object]) -> None:
    state = json.loads(tokenizer.engine.to_str())
    state[part] = (state[part] | change) if part == "model" else change
    assert alone(Engine.from_str(json.dumps(state))) is None
    assert words_of(load_tokenizer(TINY)) is None
