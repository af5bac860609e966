"""Texts encoded word by word, and each word once, where a tokenizer allows it.

The BPE of a sentencepiece model such as Llama 2's merges over a text as a whole. But a merge joins neighbours into a
piece of the vocabulary, and where no piece holds "▁", which stands for a space, after another character, none joins
what is before a space to the space. So the ids of a text are those of its words, whatever stands around them, and a
word that has been met before need not be merged again: most of a text is such words. A new word is cut once more,
around the characters that no piece has beside others (in Llama 2's vocabulary such as digits and line ends): the parts
that are left of it have mostly been met.

Both is so only of characters that are pieces themselves: of others the merges see the bytes, by the names that byte
pieces have.
"""

import re
from collections.abc import Collection
from functools import lru_cache
from itertools import chain
from typing import Any

from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE, Model
from tokenizers.pre_tokenizers import Metaspace

from minitune.tokenizer import Tokenizer

SPACE = "▁"
WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a piece that stands for one byte of a character that is no piece
FEW_ADDED = 100  # tokens beside the vocabulary, up to which looking for each takes less time than words save
LONGEST, MOST = 32, 1 << 16  # characters of a word that is kept, and kept words: 100 MB of the worst


class Words:
    """An engine whose words do not depend on one another."""

    def __init__(self, engine: Engine, known: "Known") -> None:
        self.engine, self.known = engine, known
        self.begins_with_space = engine.pre_tokenizer.prepend_scheme != "never"  # put before a text that has none
        added = [re.escape(token.content) for token in engine.get_added_tokens_decoder().values()]
        self.added = re.compile("|".join(added) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as the engine gives them."""
        if self.added.search(text):
            return self.engine.encode(text, add_special_tokens=False).ids
        text = text.replace(" ", SPACE)
        if text and self.begins_with_space and not text.startswith(SPACE):
            text = SPACE + text
        return list(chain.from_iterable(map(self.known.__getitem__, WORD.findall(text))))


class Known(dict[str, list[int]]):
    """Words and parts of words -> ids. One that is not there is looked up."""

    def __init__(self, model: Model, parts: re.Pattern[str]) -> None:
        super().__init__()
        self.model, self.parts = model, parts

    def __missing__(self, word: str) -> list[int]:
        parts = self.parts.findall(word)
        if len(parts) > 1:
            ids = list(chain.from_iterable(map(self.__getitem__, parts)))
        else:
            ids = [token.id for token in self.model.tokenize(word)]
        if len(word) <= LONGEST:
            if len(self) >= MOST:
                self.clear()
            self[word] = ids
        return ids


@lru_cache(maxsize=4)
def words_of(tokenizer: Tokenizer) -> tuple[Words, Words] | None:
    """A tokenizer's engine and its continuation by their words, which they have in common; None where one of them may
    depend on another, as far as the engines' parts tell."""
    engines = (tokenizer.engine, tokenizer.continuation)  # of one model
    if not all(engine.normalizer is None and keeps_spaces(engine.pre_tokenizer) for engine in engines):
        return None
    if any(len(engine.get_added_tokens_decoder()) > FEW_ADDED for engine in engines):
        return None
    model, vocab = tokenizer.engine.model, tokenizer.engine.get_vocab(with_added_tokens=False)
    if not merges_words_alone(model, vocab):
        return None
    known = Known(model, parts_of_words(vocab))
    return Words(tokenizer.engine, known), Words(tokenizer.continuation, known)


def keeps_spaces(spaces: Any) -> bool:
    """Whether a text's spaces become SPACE, perhaps with one more before it, and nothing else is done to it."""
    return isinstance(spaces, Metaspace) and (spaces.replacement, spaces.split) == (SPACE, False)


def merges_words_alone(model: Model, vocab: Collection[str]) -> bool:
    """Whether what a BPE model makes of a word follows from the word."""
    if not isinstance(model, BPE) or model.dropout or not model.byte_fallback or model.ignore_merges:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    known = all(f"<0x{byte:02X}>" in vocab for byte in range(256))  # else unknown characters would be fused
    return known and keeps_words_apart(vocab)


def keeps_words_apart(vocab: Collection[str]) -> bool:
    """Whether no piece joins a space to what is before it. Were SPACE no piece, its bytes could be joined."""
    return SPACE in vocab and not any(SPACE in piece.lstrip(SPACE) for piece in vocab)


def parts_of_words(vocab: Collection[str]) -> re.Pattern[str]:
    """What a word can be cut into: characters that some piece has beside others, and those that none has."""
    longer = [piece for piece in vocab if len(piece) > 1 and not only_a_byte(piece, vocab)]
    if any(map(BYTE.search, longer)):  # then a character that is no piece could be merged, too
        return re.compile(".+", re.DOTALL)
    joined = "".join(map(re.escape, sorted(set("".join(longer)) - {SPACE})))
    return re.compile(f"{SPACE}*[{joined}]+|{SPACE}+|[^{SPACE}{joined}]+") if joined else WORD


def only_a_byte(piece: str, vocab: Collection[str]) -> bool:
    """Whether a piece stands for a byte, and no merge makes it of the letters of its name."""
    cuts = range(1, len(piece))
    return bool(BYTE.fullmatch(piece)) and not any(piece[:cut] in vocab and piece[cut:] in vocab for cut in cuts)
