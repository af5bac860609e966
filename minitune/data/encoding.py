"""Text with its answers -> token ids and marks.

The ids before an answer are those that inference will give the model, and the answer's ids go on from them: nothing
is ever learned across a seam.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Encoding

from minitune.data.words import words_of
from minitune.tokenizer import Tokenizer, at_work


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
    over.

    Raises:
        GivesUp: one of the texts is too much for the tokenizer's pattern.
    """
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
    first = encode_all([draft[0].text for draft in drafts if draft], tokenizer)
    others = encode_all([piece.text for draft in drafts for piece in draft[1:]], tokenizer, continuing=True)
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


def encode_all(texts: list[str], tokenizer: Tokenizer, continuing: bool = False) -> list[list[int]]:
    """The ids of each text, as the beginning of one or as what goes on after another."""
    words, engine = words_of(tokenizer), tokenizer.continuation if continuing else tokenizer.engine
    with at_work():
        if words:
            return [words[continuing].encode(text) for text in texts]
        return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)] if texts else []


# ---- scripts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The ids of a text, and the characters that each is of."""

    ids: list[int]
    starts: list[int]
    stops: list[int]

    @classmethod
    def of(cls, encoding: Encoding) -> "Tokens":
        offsets = encoding.offsets
        return cls(encoding.ids, [start for start, _ in offsets], [stop for _, stop in offsets])

    def before(self, place: int) -> int:
        """How many tokens end at a place of the text, or before it."""
        return bisect_right(self.stops, place)

    def marked(self, spans: Iterable[tuple[int, int]]) -> list[bool]:
        """Whether each token holds a character of one of the spans."""
        marks = [False] * len(self.ids)
        for start, stop in spans:
            first, after = self.before(start), bisect_left(self.starts, stop)
            marks[first:after] = [True] * (after - first)
        return marks


def encoded_scripts(scripts: Sequence[Script], tokenizer: Tokenizer) -> list[list[Document]]:
    """Each script as a whole; where a token would reach over the seam of an answer, that answer stands in a document
    of its own instead, as what goes on after its prompt."""
    with at_work():
        encodings = tokenizer.engine.encode_batch([script.text for script in scripts], add_special_tokens=False)
    wholes = [Tokens.of(encoding) for encoding in encodings]
    prompts = [
        prompt_end(answer, script, whole, tokenizer)
        for script, whole in zip(scripts, wholes, strict=True)
        for answer in script.answers
    ]
    alone = encode_all([text for text, _ in prompts], tokenizer)
    as_asked = iter([ids == expected for ids, (_, expected) in zip(alone, prompts, strict=True)])
    documents = []
    for script, whole in zip(scripts, wholes, strict=True):
        fitting = [(answer, next(as_asked)) for answer in script.answers]
        within = [answer for answer, fits in fitting if fits]
        outside = [answer for answer, fits in fitting if not fits]
        found = [continued(script, answer, tokenizer) for answer in outside]
        if within or not outside:
            marks = whole.marked(span for answer in within for span in answer.spans)
            found.insert(0, ended(whole.ids, marks, script.ends, tokenizer))
        documents.append(found)
    return documents


def prompt_end(answer: Answer, script: Script, whole: Tokens, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The end of a prompt, and the ids that it has in the whole text: from the last fence on, as no token is merged
    across one. Only if it has these ids by itself, too, does the whole text begin with the ids of the prompt."""
    ids = whole.ids[: whole.before(answer.asked)]
    cut = fences(tokenizer)
    fence = next((number for number in reversed(range(len(ids))) if ids[number] in cut), None)
    if fence is None:
        return script.text[: answer.asked], ids
    return script.text[whole.starts[fence] : answer.asked], ids[fence:]


@lru_cache(maxsize=8)
def fences(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens at which a text is cut before anything else is done to it: what stands on one side of such a token
    has the same ids whatever stands on the other."""
    added = tokenizer.engine.get_added_tokens_decoder().items()
    return frozenset(id for id, token in added if not token.normalized and not token.single_word)


def continued(script: Script, answer: Answer, tokenizer: Tokenizer) -> Document:
    """A prompt with the ids that it has alone, then an answer with those of a continuation."""
    prompt, stop = tokenizer.encode(script.text[: answer.asked]), answer.spans[-1][1]
    with at_work():
        encoding = tokenizer.continuation.encode(script.text[answer.asked : stop], add_special_tokens=False)
    rest = Tokens.of(encoding)
    marks = rest.marked((start - answer.asked, stop - answer.asked) for start, stop in answer.spans)
    ends = script.ends and stop == len(script.text)
    return ended([*prompt, *rest.ids], [*[False] * len(prompt), *marks], ends, tokenizer)


def ended(ids: list[int], trained: list[bool], ends: bool, tokenizer: Tokenizer) -> Document:
    """A document with an eos after it, where it takes one; it is trained as the last token before it is."""
    if ends and ids[-1:] != [tokenizer.eos_id]:
        ids, trained = [*ids, tokenizer.eos_id], [*trained, *trained[-1:]]
    return begun(ids, trained, tokenizer)
