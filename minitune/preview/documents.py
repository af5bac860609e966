"""Documents as the model meets them: their text, and which of it is learned."""

from collections.abc import Iterator

import numpy as np

from minitune import secrets
from minitune.data import Prepared
from minitune.data.looks import visible
from minitune.data.store import Store
from minitune.preview import Shown, Stretch
from minitune.tokenizer import Tokenizer

ROWS = 5  # that are shown
HEAD, TAIL = 400, 100  # tokens that are shown of a longer document


def glance(data: Prepared, tokenizer: Tokenizer) -> Iterator[str]:
    """The first row as it is trained on, in one line."""
    for entry in data.train_entries[:1].tolist():
        ids, trained = data.store.tokens(entry)
        first = int(np.argmax(trained))
        before = tokenizer.decode(ids[:first].tolist(), skip_special=False)
        learned = tokenizer.decode(ids[trained].tolist(), skip_special=False)
        yield (
            f"{visible(data.store.origin(entry))}, as the model meets it: after {quoted(before, last=True)} it learns "
            f"{quoted(learned)} ({np.count_nonzero(trained)} of {len(ids)} tokens)"
        )


def quoted(text: str, most: int = 60, last: bool = False) -> str:
    """A text on one line, its end or its beginning where it is long."""
    text = secrets.shortened(text, most + 3, last)
    return '"' + visible(text).replace("\n", "\\n").replace("\t", "\\t") + '"'


def first_entries(store: Store, entries: np.ndarray) -> list[int]:
    """The first document of each file, and those that follow the first."""
    file = store.column("file")[entries]
    _, first = np.unique(file, return_index=True)
    chosen = dict.fromkeys(entries[[*first, *range(len(entries[:ROWS]))]].tolist())
    return sorted([*chosen][:ROWS])


def shown(store: Store, entry: int, tokenizer: Tokenizer) -> Shown:
    ids, trained = store.tokens(entry)
    learned = tokenizer.decode(ids[trained].tolist(), skip_special=False)
    return Shown(
        store.origin(entry),
        len(ids),
        int(np.count_nonzero(trained[1:])),
        list(stretches(ids, trained, tokenizer)),
        learned,
    )


def stretches(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> Iterator[Stretch]:
    """The text of a document in stretches; put together, and without what is left out, its text whole.

    A stretch's text is what the decoded text grows by, as tokens decoded by themselves lose spaces at their seams. A
    character whose bytes lie on both sides of a seam stands in the later stretch.
    """
    total = len(ids)
    hidden = range(HEAD, total - TAIL) if total > HEAD + TAIL else range(0)
    ends = {*(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), total}
    ends = {end for end in ends if end not in hidden} | ({hidden.start, hidden.stop} if hidden else set())
    whole = tokenizer.decode(ids.tolist(), skip_special=False)
    safe = secrets.blacked_out(whole)  # before it is cut
    start, before = 0, 0  # of the stretch: in tokens, and in characters
    for end in sorted(ends):
        text = tokenizer.decode(ids[:end].tolist(), skip_special=False)
        text = text if safe == whole else safe[: len(text)]
        after = len(text) if end == total else len(text.rstrip("\ufffd"))
        if hidden and end == hidden.stop:
            yield Stretch("", False, left_out=end - start)
        else:
            yield Stretch(text[before:after], bool(trained[start]))
        start, before = end, after
