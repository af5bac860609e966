"""Texts encoded word by word, and each word once, where a tokenizer allows it.

The BPE of a sentencepiece model such as Llama 2's merges over a text as a whole. But a merge joins neighbours into a
piece of the vocabulary, and where no piece holds "▁", which stands for a space, after another character, none joins
what is before a space to the space. So the ids of a text are those of its words, whatever stands around them, and a
word that has been met before need not be merged again: most of a text is such words.
"""

import json
import re
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer as Engine

SPACE = "▁"
WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
LONGEST, MOST = 32, 1 << 16  # characters of a word that is kept, and kept words: 100 MB of the worst


class Words:
    """An engine whose words do not depend on one another."""

    def __init__(self, engine: Engine, begins_with_space: bool) -> None:
        self.engine, self.model = engine, engine.model
        self.begins_with_space = begins_with_space  # one is put before a text that has none
        added = [re.escape(token.content) for token in engine.get_added_tokens_decoder().values()]
        self.added = re.compile("|".join(added) or r"(?!)")
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as the engine gives them."""
        if self.added.search(text):
            return self.engine.encode(text, add_special_tokens=False).ids
        text = text.replace(" ", SPACE)
        if text and self.begins_with_space and not text.startswith(SPACE):
            text = SPACE + text
        ids: list[int] = []
        known = self.known
        for word in WORD.findall(text):
            ids += known[word] if word in known else self.look_up(word)
        return ids

    def look_up(self, word: str) -> list[int]:
        ids = [token.id for token in self.model.tokenize(word)]
        if len(word) <= LONGEST:
            if len(self.known) == MOST:
                self.known.clear()
            self.known[word] = ids
        return ids


@lru_cache(maxsize=4)
def words_of(engine: Engine) -> Words | None:
    """The engine by its words; None where one of them may depend on another, as far as its description tells."""
    state = json.loads(engine.to_str())
    spaces = state["pre_tokenizer"] or {}
    plain = (
        state["normalizer"] is None
        and spaces.get("type") == "Metaspace"
        and (spaces.get("replacement"), spaces.get("split")) == (SPACE, False)
        and merges_words_alone(state["model"])
    )
    return Words(engine, spaces["prepend_scheme"] != "never") if plain else None


def merges_words_alone(model: dict[str, Any]) -> bool:
    """Whether what a BPE model makes of a word follows from the word."""
    if model["type"] != "BPE" or model["dropout"] or not model["byte_fallback"] or model["ignore_merges"]:
        return False
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return False
    vocab = model["vocab"]
    known = all(f"<0x{byte:02X}>" in vocab for byte in range(256))  # else unknown characters would be fused
    return known and not any(SPACE in piece.lstrip(SPACE) for piece in vocab)
