"""Text with its answers -> token ids and marks.

The ids before an answer are those that inference will give the model, and the answer's ids go on from them: nothing
is ever learned across a seam.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter

from tokenizers import Encoding
from tokenizers import Tokenizer as Engine

from minitune.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """One example as the model meets it."""

    ids: list[int]
    trained: list[bool]  # is this token to be learned
    cut: bool = False  # its end was left out, as it was too long

    @property
    def learns(self) -> bool:
        """Whether anything is learned from it; a first token has nothing before it to be predicted from."""
        return any(self.trained[1:])


@dataclass(frozen=True)
class Piece:
    """A stretch of text that becomes ids by itself, going on after those before it."""

    text: str
    trained: bool = False
    ends: bool = False  # an eos token follows it, trained as the piece is


@dataclass(frozen=True)
class Answer:
    """A place in a text where the model is asked, and what it is to write there."""

    asked: int  # text[:asked] is the prompt
    spans: tuple[tuple[int, int], ...]  # text[start:stop] of each is to be learned; none begins before `asked`


@dataclass(frozen=True)
class Script:
    """A text that becomes ids as a whole, as at inference."""

    text: str
    answers: tuple[Answer, ...] = ()
    ends: bool = False  # an eos token follows it, trained as the text's last token is


def encoded(drafts: Sequence[list[Piece] | Script], tokenizer: Tokenizer) -> list[list[Document]]:
    """The documents of each draft: one, and one more for each answer of a script at whose seam a token would reach
    over."""
    scripts = [draft for draft in drafts if isinstance(draft, Script)]
    pieces = [draft for draft in drafts if not isinstance(draft, Script)]
    ids_of_pieces = iter(encoded_pieces(pieces, tokenizer))
    of_scripts = iter(encoded_scripts(scripts, tokenizer))
    return [next(of_scripts) if isinstance(draft, Script) else [next(ids_of_pieces)] for draft in drafts]


def begun(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Document:
    """A document with one bos at its start, if the model expects it."""
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
        return Document([tokenizer.bos_id, *ids], [False, *trained])
    return Document(ids, trained)


# ---- pieces --------------------------------------------------------------------------------------------------------


def encoded_pieces(drafts: Iterable[Iterable[Piece]], tokenizer: Tokenizer) -> list[Document]:
    """The first text of each draft is encoded as the beginning of a text, each other one as what goes on after it.

    So a prompt has the ids that it has alone, and an answer those of a continuation, whatever the two would merge to.
    """
    drafts = [[piece for piece in draft if piece.text or piece.ends] for draft in drafts]
    first = encode_all(tokenizer.engine, [draft[0].text for draft in drafts if draft])
    others = encode_all(tokenizer.continuation, [piece.text for draft in drafts for piece in draft[1:]])
    firsts, others = iter(first), iter(others)
    documents = []
    for draft in drafts:
        ids: list[int] = []
        trained: list[bool] = []
        for number, piece in enumerate(draft):
            ids += next(others) if number else next(firsts)
            if piece.ends and ids[-1:] != [tokenizer.eos_id]:
                ids.append(tokenizer.eos_id)
            trained += [piece.trained] * (len(ids) - len(trained))
        documents.append(begun(ids, trained, tokenizer))
    return documents


def encode_all(engine: Engine, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)] if texts else []


# ---- scripts -------------------------------------------------------------------------------------------------------


def encoded_scripts(scripts: Sequence[Script], tokenizer: Tokenizer) -> list[list[Document]]:
    """Each script as a whole; where a token would reach over the seam of an answer, that answer stands in a document
    of its own instead, as what goes on after its prompt."""
    wholes = tokenizer.engine.encode_batch([script.text for script in scripts], add_special_tokens=False)
    asked = [
        Seam.at(answer.asked, script.text, whole, tokenizer)
        for script, whole in zip(scripts, wholes, strict=True)
        for answer in script.answers
    ]
    alone = iter(encode_all(tokenizer.engine, [seam.tail for seam in asked]))
    seams = iter(asked)
    documents = []
    for script, whole in zip(scripts, wholes, strict=True):
        as_asked = [next(alone) == next(seams).ids for _ in script.answers]
        spans = [span for answer, fits in zip(script.answers, as_asked, strict=True) if fits for span in answer.spans]
        found = []
        if spans or all(as_asked):
            found.append(begun(*marked(whole, spans, tokenizer.eos_id if script.ends else None), tokenizer))
        for answer, fits in zip(script.answers, as_asked, strict=True):
            if not fits:
                found.append(continued(script, answer, tokenizer))
        documents.append(found)
    return documents


@dataclass(frozen=True)
class Seam:
    """The ids of a whole text that stand before an answer, from the last token on that nothing merges with."""

    tail: str  # what must have these ids by itself
    ids: list[int]

    @classmethod
    def at(cls, place: int, text: str, whole: Encoding, tokenizer: Tokenizer) -> "Seam":
        ids = whole.ids[: bisect_right(whole.offsets, place, key=itemgetter(1))]
        control = fences(tokenizer)
        first = next((number for number in reversed(range(len(ids))) if ids[number] in control), None)
        if first is None:
            return cls(text[:place], ids)
        return cls(text[whole.offsets[first][0] : place], ids[first:])


@lru_cache(maxsize=8)
def fences(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens at which a text is cut before anything else is done to it: what stands on one side of such a token
    has the same ids whatever stands on the other."""
    added = tokenizer.engine.get_added_tokens_decoder().items()
    return frozenset(id for id, token in added if not token.normalized and not token.single_word)


def marked(encoding: Encoding, spans: list[tuple[int, int]], end: int | None) -> tuple[list[int], list[bool]]:
    """Ids with the tokens of some spans trained: every token that holds a character of one; then an `end`, if any,
    trained as the last of them is."""
    ids, offsets = encoding.ids, encoding.offsets
    trained = [False] * len(ids)
    for start, stop in spans:
        first = bisect_right(offsets, start, key=itemgetter(1))
        after = bisect_left(offsets, stop, key=itemgetter(0))
        trained[first:after] = [True] * (after - first)
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
        trained += trained[-1:]
    return ids, trained


def continued(script: Script, answer: Answer, tokenizer: Tokenizer) -> Document:
    """A prompt with the ids that it has alone, then an answer with those of a continuation."""
    stop = answer.spans[-1][1]
    prompt = tokenizer.encode(script.text[: answer.asked])
    rest = tokenizer.continuation.encode(script.text[answer.asked : stop], add_special_tokens=False)
    spans = [(start - answer.asked, stop - answer.asked) for start, stop in answer.spans]
    ends = script.ends and stop == len(script.text)
    ids, trained = marked(rest, spans, tokenizer.eos_id if ends else None)
    return begun([*prompt, *ids], [*[False] * len(prompt), *trained], tokenizer)
