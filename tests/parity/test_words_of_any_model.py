"""Texts by their words against the tokenizers library, for models that are made up: whatever is taken by its words has
the engine's ids."""

import json
from collections.abc import Callable, Collection
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from minitune.data import words
from minitune.data.words import BYTE, SPACE, words_of
from minitune.pretrained import TINY
from minitune.tokenizer import Tokenizer, load_tokenizer, without_prefix

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SEEN = [f"<0x{byte:02X}>" for byte in (0xE2, 0x96, 0x81, 0x61, 0xC3, 0xA9)]  # of "▁", "a" and "é"
ALPHABETS = ["abcé", "ab-]^[", "<0x41>", "a\nb\t", "日本a\u3000", "ab'\\&|~"]
Merges = list[tuple[str, str]]
TINYS = load_tokenizer(TINY)


def model(pieces: list[str], merges: Merges, scheme: str = "first") -> Tokenizer:
    made = [piece for left, right in merges for piece in (left, right, left + right)]
    vocab = {piece: id for id, piece in enumerate(dict.fromkeys([*BYTES, *pieces, *made]))}
    bpe = {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges], "byte_fallback": True}
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    state = {"version": "1.0", "added_tokens": [], "pre_tokenizer": spaces, "model": bpe | {"unk_token": None}}
    engine, continuation = (Engine.from_str(json.dumps(each)) for each in (state, without_prefix(state)))
    for each in (engine, continuation):
        each.add_tokens([AddedToken("<s>", special=True, normalized=False)])
    return replace(TINYS, engine=engine, continuation=continuation)


@st.composite
def models(draw: st.DrawFn) -> tuple[Tokenizer, str]:
    """A model that few merges make, with a text of its letters and some more."""
    alphabet = draw(st.sampled_from(ALPHABETS))
    letters = draw(st.lists(st.sampled_from(alphabet), unique=True, min_size=1))
    letters += [SPACE] * draw(st.booleans())
    pieces, merges = letters + SEEN, []
    for _ in range(draw(st.integers(0, 12))):
        pair = draw(st.tuples(st.sampled_from(pieces), st.sampled_from(pieces)))
        if pair not in merges:
            merges.append(pair)
            pieces = [*pieces, "".join(pair)]
    text = draw(st.text(st.sampled_from(alphabet + f"  {SPACE}zé"), max_size=20))
    return model(letters, merges, draw(st.sampled_from(["first", "always", "never"]))), text


def check(case: tuple[Tokenizer, str]) -> None:
    tokenizer, text = case
    engines = (tokenizer.engine, tokenizer.continuation)
    for engine, by_words in zip(engines, words_of(tokenizer) or (), strict=False):
        assert by_words.encode(text) == engine.encode(text, add_special_tokens=False).ids


def search(examples: int, **how: object) -> None:
    settings(deadline=None, max_examples=examples, database=None, **how)(given(models())(check))()


def test_what_is_taken_by_its_words_has_the_engines_ids() -> None:
    search(400)


def spaces_that_are_no_piece(vocab: Collection[str]) -> bool:
    return not any(SPACE in piece.lstrip(SPACE) for piece in vocab)


def no_merge_makes_a_byte(piece: str, vocab: Collection[str]) -> bool:
    return bool(BYTE.fullmatch(piece))


MADE_OF_LETTERS = [("0", "x"), ("0x", "4"), ("0x4", "1"), ("0x41", ">"), ("<", "0x41>")]


@pytest.mark.parametrize(
    ("rule", "mutant", "case"),
    [
        ("keeps_words_apart", spaces_that_are_no_piece, (model(["a"], [("a", "<0xE2>")]), "a a")),
        ("only_a_byte", no_merge_makes_a_byte, (model([*"<0x41>", SPACE], MADE_OF_LETTERS), "<0x41>")),
    ],
)
def test_the_check_finds_what_was_overlooked(
    monkeypatch: pytest.MonkeyPatch, rule: str, mutant: Callable[..., bool], case: tuple[Tokenizer, str]
) -> None:
    check(case)
    monkeypatch.setattr(words, rule, mutant)
    words_of.cache_clear()
    with pytest.raises(AssertionError):
        check(case)
    if rule == "keeps_words_apart":  # common enough to be met by chance
        with pytest.raises(AssertionError):
            search(2000, derandomize=True)
    words_of.cache_clear()


def test_many_added_tokens_are_left_to_the_engine() -> None:
    """They are looked for one after another, which takes longer than the engine takes for all."""
    tokenizer = model(["a", SPACE], [])
    assert words_of(tokenizer)
    more = replace(tokenizer)
    more.continuation.add_tokens([f"[control_{number}]" for number in range(words.FEW_ADDED)])
    assert words_of(more) is None
