"""What a tokenizer's description may hold, checked before the library that runs it sees it.

The library takes any description that parses: a normalizer that makes a megabyte of each letter, a regular expression
that tries 2^n ways, tokens without end. Descriptions in use are far inside the bounds here.
"""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitune.errors import UserError
from minitune.secrets import shortened

TOKENS = 2_000_000  # of a vocabulary; also the highest id
MERGES = 4_000_000
ADDED = 20_000  # tokens beside the vocabulary
TEXT = 1000  # characters of a token
PARTS = 64  # of a normalizer, pre-tokenizer, decoder or post-processor
CONTENT = 64  # characters that one part may put in a text
GROWTH = 64  # how many times as long a text may become
PATTERN = 2000  # characters of a regular expression
REPEATS = 4  # in one branch of it; n of them may look n times at each letter of a text
SENTENCEPIECE = 8_000_000  # bytes of a tokenizer.model; the largest in use has 5 million
SPLITS = 5_000_000  # places at which all pieces of a sentencepiece model can be cut in two
STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def check(state: dict[str, Any], path: Path) -> None:
    """Raise UserError unless a tokenizer's description (tokenizer.json) is within bounds."""
    for problem in problems(state):
        raise UserError(f"{path}: {problem}")


def problems(state: dict[str, Any]) -> Iterator[str]:
    model = state.get("model")
    if not isinstance(model, dict):
        yield "model must be an object"
        return
    yield from problems_of_model(model)
    added = state.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > ADDED:
        yield f"added_tokens must be a list of at most {ADDED:,} tokens"
        return
    for token in added:
        if not isinstance(token, dict) or not is_text(token.get("content")) or not is_id(token.get("id")):
            yield f"added_tokens holds {shown(token)} where an id and a token's text should be"
    growth = 1.0
    for stage in STAGES:
        parts = list(parts_of(state.get(stage)))
        if len(parts) > PARTS:
            yield f"{stage} has {len(parts):,} parts; {PARTS} are the most"
        for part in parts:
            yield from problems_of_part(part, stage)
            if stage != "post_processor":
                growth *= growth_of(part)
    if growth > GROWTH:
        yield f"its normalizer and decoder can make a text {growth:,.0f} times as long; {GROWTH} times is the most"


def problems_of_model(model: dict[str, Any]) -> Iterator[str]:
    vocab, merges = model.get("vocab"), model.get("merges") or []
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel
        pieces, ids = vocab.keys(), vocab.values()
    elif isinstance(vocab, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in vocab):  # Unigram
        pieces, ids = [pair[0] for pair in vocab], range(len(vocab))
    else:
        yield "model.vocab must be an object from pieces to ids, or a list of pieces with their scores"
        return
    if len(vocab) > TOKENS:
        yield f"model.vocab holds {len(vocab):,} pieces; {TOKENS:,} are the most"
    elif not all(map(is_id, ids)) or len(set(ids)) < len(vocab):
        yield f"the ids in model.vocab must be whole numbers from 0 to {TOKENS:,}, each of one piece"
    if not all(map(is_text, pieces)):
        yield f"model.vocab holds a piece that is no text of at most {TEXT} characters"
    if not isinstance(merges, list) or len(merges) > MERGES:
        yield f"model.merges must be a list of at most {MERGES:,} pairs"
    elif not all(isinstance(pair, str) or (isinstance(pair, list | tuple) and len(pair) == 2) for pair in merges):
        yield "model.merges holds something that is no pair"
    if model.get("dropout"):
        yield "model.dropout is set: it would make other ids of the same text each time"


def problems_of_part(part: dict[str, Any], stage: str) -> Iterator[str]:
    kind = part.get("type")
    for key in ("content", "prepend", "replacement", "prefix", "suffix", "cls", "sep"):
        value = part.get(key)
        if isinstance(value, str) and len(value) > CONTENT:
            yield f"{stage}: {key} of {shown(kind)} has {len(value):,} characters; {CONTENT} are the most"
    if kind == "Precompiled" and (why := trouble_in_charsmap(part.get("precompiled_charsmap"))):
        yield f"{stage}: precompiled_charsmap {why}"
    pattern = part.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(expression, str) and (why := trouble_in(expression)):
        yield f"{stage}: the pattern {shown(expression)} {why}, and could take for ever on a text"
    for key in ("single", "pair"):
        if isinstance(part.get(key), list) and len(part[key]) > PARTS:
            yield f"{stage}: {key} of {shown(kind)} has {len(part[key]):,} pieces; {PARTS} are the most"
    special = part.get("special_tokens")
    if isinstance(special, dict) and len(special) > PARTS:
        yield f"{stage}: {shown(kind)} has {len(special):,} special tokens; {PARTS} are the most"
    for token in special.values() if isinstance(special, dict) else ():
        if not isinstance(token, dict) or not all(map(is_id, token.get("ids") or [0])):
            yield f"{stage}: special_tokens of {shown(kind)} holds an id that no token can have"


def parts_of(stage: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or the like, those in a sequence one by one."""
    if not isinstance(stage, dict):
        return
    yield stage
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        for inner in stage.get(key) or [] if isinstance(stage.get(key), list) else []:
            yield from parts_of(inner)


def growth_of(part: dict[str, Any]) -> float:
    """How many times as long a part can make a text."""
    if part.get("type") != "Replace" or not isinstance(part.get("content"), str):
        return 1.0
    pattern = part.get("pattern")
    sought = pattern.get("String") if isinstance(pattern, dict) else None
    length = len(sought) if isinstance(sought, str) and sought else 1
    between = 0 if sought else 1  # an expression, like an empty text, may match between two letters as well
    return max(1.0, len(part["content"]) / length + between)


def trouble_in(expression: str) -> str:
    """Why matching a regular expression may take exponential time, or empty.

    Those in use repeat letters and classes of letters (`\\p{L}+`, `[\\r\\n]*`), never a group; and only what holds a
    repetition, itself repeated, can be matched in 2^n ways.
    """
    if len(expression) > PATTERN:
        return f"has {len(expression):,} characters"
    if re.search(r"(?<!\\)(?:\\\\)*\\[1-9kg]", expression):
        return "refers back to a group"
    letters = re.sub(r"\\[pP]\{[^{}]*\}|\\x\{[^{}]*\}|\\.", "x", expression, flags=re.DOTALL)  # an escape is a letter
    letters = re.sub(r"\[\^?\]?[^\[\]]*\]", "x", letters)  # and so is a class
    if "[" in letters or "]" in letters:
        return "has a class within a class"
    if re.search(r"\)[*+{]|\}[*+{]|[*+]\{|\(\?[~(]", letters):
        return "repeats a group"
    if re.search(r"\{\d*,?\d{4,}", letters):
        return "repeats a letter thousands of times"
    if any(len(re.findall(r"[*+]|,\}", branch)) > REPEATS for branch in letters.split("|")):
        return f"repeats letters more than {REPEATS} times in one branch"
    return ""


def trouble_in_charsmap(encoded: Any) -> str:
    """Why sentencepiece's table of normalised letters is none, or empty: four bytes say how long a trie is, then come
    the trie, of four bytes a node, and the texts that it leads to, a NUL after each."""
    try:
        table = base64.b64decode(encoded or "", validate=True)
    except (ValueError, TypeError):
        return "is no base64 text"
    length = int.from_bytes(table[:4], "little")
    if table and (length % 4 or length > len(table) - 4):
        return "is cut short, or none at all"
    if any(len(text) > 4 * CONTENT for text in table[4 + length :].split(b"\0")):
        return f"makes more than {CONTENT} characters of one"
    return ""


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= TOKENS


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= TEXT


def shown(value: Any) -> str:
    """A value of a file, cut to what fits in a line."""
    return shortened(repr(value), 60)
