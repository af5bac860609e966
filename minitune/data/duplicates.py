"""Near duplicates: rows that say almost the same, found without comparing every row to every other.

Two texts are as alike as the share of their shingles that both have (Jaccard), a shingle being any `WIDTH` characters
in a row: so it works for scripts that put no spaces between words. A row's sketch is 128 MinHashes of its shingles, of
each the low byte ("b-bit minwise hashing", arXiv:0910.3349). A byte of two sketches is equal with probability J, or by
chance, so the share of equal bytes estimates J (standard error 0.035 at J = 0.8). Eight bytes together are a key
that two rows share with probability J^8, and that is how the few pairs worth a comparison are found: with 16 keys a
pair of J = 0.8 is compared with probability 0.95, one of 0.85 with 0.993, one of 0.9 with 0.9999.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version

import numpy as np
from rensa import RMinHash

from minitune.data.examples import Chat, Example, Instruction, texts

WIDTH = 5  # characters of a shingle
THRESHOLD = 0.8  # estimated Jaccard from which two rows are near duplicates
KEYS = 16  # keys of a sketch, each uint64
HASHES = 8 * KEYS
SEED = 1
AT_ONCE = (64, 1 << 15)  # texts and characters in one call: over 2^8 or 2^16 rensa starts threads, fatal after a fork
COMPARED = 1 << 16  # pairs compared at once, 8 MB of sketches a side
ROUNDS = 16  # rows of one bucket that the others are compared to, at most

IDENTITY = f"rensa {version('rensa')} R-MinHash {RMinHash.ALGORITHM_VERSION}; {WIDTH} {HASHES} {SEED}"


def said(example: Example) -> str:
    """What is compared of an example: all its text, but for the system's and the tools, which rows have in common
    without being alike."""
    match example:
        case Chat(turns=turns):
            example = replace(example, turns=tuple(turn for turn in turns if turn.role != "system"), tools="")
        case Instruction():
            example = replace(example, system="")
    return "\n".join(filter(None, texts(example)))


def similarity(a: str, b: str) -> float:
    """The Jaccard similarity of two texts, exactly: what sketches estimate."""
    one, other = ({text[i : i + WIDTH] for i in range(len(text) - WIDTH + 1)} for text in map(normalized, (a, b)))
    return len(one & other) / len(one | other)


def normalized(text: str) -> str:
    """The text as it is compared: case, white space and the spelling of accents aside; at least one shingle long."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split()).ljust(WIDTH, "\0")


# ---- texts -> sketches ---------------------------------------------------------------------------------------------


def sketches(texts: Sequence[str]) -> np.ndarray:
    """The sketches of some texts, (texts, KEYS) uint64. No threads are started."""
    result = np.empty((len(texts), HASHES), np.uint8)
    start = 0
    for some in portions([normalized(text) for text in texts]):
        result[start : start + len(some)] = minhashes(some)  # the low bytes
        start += len(some)
    return result.view(np.uint64)


def portions(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, in lists of at most AT_ONCE, or of one long text."""
    some: list[str] = []
    characters = 0
    for text in texts:
        if some and (len(some) == AT_ONCE[0] or characters + len(text) > AT_ONCE[1]):
            yield some
            some, characters = [], 0
        some.append(text)
        characters += len(text)
    if some:
        yield some


def minhashes(texts: list[str]) -> np.ndarray:
    """(texts, HASHES) uint32."""
    shingles, offsets = shingle_hashes(texts)
    if len(texts) == 1:  # it may be long, and one row alone starts no threads here
        matrix = RMinHash.digest_matrix_from_token_hash_sets([shingles.tolist()], HASHES, SEED)
    else:
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, HASHES, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def shingle_hashes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of every shingle, text after text, and where each text's begin: (S,) and (texts + 1,) uint64."""
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    ends = np.cumsum([len(text) for text in texts])
    hashes = np.zeros(len(characters) - WIDTH + 1, np.uint64)
    for place in range(WIDTH):  # a polynomial in the characters, modulo 2^64
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += characters[place : place + len(hashes)]
    hashes ^= hashes >> np.uint64(31)  # mixed, as a product's low bits depend on its factors' low bits alone
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(29)
    within = np.ones(len(hashes), np.bool_)
    for back in range(1, WIDTH):  # a shingle does not reach into the next text
        within[ends[:-1] - back] = False
    offsets = np.concatenate([[0], ends - (WIDTH - 1) * np.arange(1, len(texts) + 1)])
    return hashes[within], offsets.astype(np.uint64)


# ---- sketches -> groups --------------------------------------------------------------------------------------------


def groups(sketches: np.ndarray) -> np.ndarray:
    """For each row the number of the earlier row that it is a near duplicate of, or its own number; (rows,) int64.

    A row that stands for a group is a near duplicate of no row before it that stands for one; every other member of
    the group has been compared to it, not to another member, so that no chain joins rows that are not alike. Which
    group a row is in depends on the rows before it alone.

    Args:
        sketches: (rows, KEYS) uint64, in memory or memory-mapped: it is read a column at a time.
    """
    group = np.arange(len(sketches))
    for later, earlier in alike(sketches):
        if group[later] == later and group[earlier] == earlier:
            group[later] = earlier
    return group


def alike(sketches: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of rows (later, earlier) that are near duplicates, in order: of each later row, those with the rows that
    come first in the buckets it is in."""
    rows = len(sketches)
    found = np.empty(0, np.int64)  # later * rows + earlier
    for key in range(KEYS):
        here = [later * rows + earlier for earlier, later in bucket_pairs(sketches, key)]
        found = np.sort(np.concatenate([found, *here]))
        found = found[np.diff(found, prepend=-1) > 0]  # once each; np.unique takes five times as long
    for code in found:
        yield divmod(int(code), rows)


def bucket_pairs(sketches: np.ndarray, key: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Near duplicates (earlier, later) among rows that share one key: the first of a bucket with all that are like it,
    the first of those that are not with the rest, and so on."""
    column = np.ascontiguousarray(sketches[:, key])
    order = np.argsort(column, kind="stable")
    column = column[order]
    begins = starts(column)
    shared = ~begins | np.append(~begins[1:], False)[: len(begins)]  # a bucket holds another row
    left, bucket = order[shared], column[shared]
    for _ in range(ROUNDS):
        begins = starts(bucket)
        earlier = np.repeat(left[begins], np.diff(np.flatnonzero(begins), append=len(left)))[~begins]
        later, bucket = left[~begins], bucket[~begins]
        if not len(later):
            return
        similar = estimates(sketches, earlier, later) >= THRESHOLD
        yield earlier[similar], later[similar]
        left, bucket = later[~similar], bucket[~similar]


def starts(ordered: np.ndarray) -> np.ndarray:
    """Where another value than the one before stands, bool."""
    return np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]


def estimates(sketches: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of rows a[i] and b[i], (pairs,) float."""
    equal = np.empty(len(a))
    for start in range(0, len(a), COMPARED):
        some = slice(start, start + COMPARED)
        one, other = (np.ascontiguousarray(sketches[rows[some]]).view(np.uint8) for rows in (a, b))
        equal[some] = np.mean(one == other, axis=1)
    return (equal - 1 / 256) / (1 - 1 / 256)  # bytes that are equal by chance aside
