"""A preview as text for a terminal.

Trained tokens stand on a coloured ground where colour is wanted, and in brackets where it is not. Every text that comes
from a row or a name goes through `visible`, so that nothing in it is obeyed.
"""

import shutil
import textwrap
import unicodedata
from collections.abc import Iterator

from minitune import secrets
from minitune.data.looks import visible
from minitune.preview import Found, Preview, Shown, Stretch, Twins

TRAINED, BOLD, DIM, PLAIN = "\x1b[30;42m", "\x1b[1m", "\x1b[2m", "\x1b[0m"
OPEN, CLOSE = "\u27e6", "\u27e7"  # white square brackets
BAR = 32  # characters of the longest bar
NO_WIDTH = ("Mn", "Me", "Cf")  # marks on other characters, and joiners
EXCERPT = 100
LONGEST = 800  # characters of a stretch
LEARNED = 300  # characters of what a row learns


def text(preview: Preview, colour: bool) -> str:
    """The whole preview, ending in a line end."""
    return "\n".join(Writer(colour).lines(preview)) + "\n"


class Writer:
    """Lines of text, in colour or not."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour
        self.width = min(120, shutil.get_terminal_size((100, 24)).columns)

    def styled(self, style: str, text: str) -> str:
        return f"{style}{text}{PLAIN}" if self.colour else text

    def title(self, words: str, note: str = "") -> Iterator[str]:
        yield ""
        yield self.styled(BOLD, words) + (f"  {self.styled(DIM, note)}" if note else "")

    def lines(self, preview: Preview) -> Iterator[str]:
        yield self.styled(BOLD, "Data preview") + "  " + self.styled(DIM, visible(", ".join(preview.files)))
        for warning in preview.warnings:
            yield from textwrap.wrap(f"warning: {visible(secrets.hidden(warning))}", self.width, subsequent_indent="  ")
        how = "on a green ground" if self.colour else f"in {OPEN}brackets{CLOSE}"
        yield from self.title("What the model learns", f"trained tokens {how}")
        for row in preview.rows:
            yield from self.row(row)
        yield from self.title("Counts")
        yield from self.counts(preview)
        if preview.left_out:
            yield from self.title("Left out")
            for found in preview.left_out:
                yield from self.found(found)
        if preview.lengths:
            yield from self.lengths(preview)
        yield from self.title("Packing")
        yield from self.packing(preview)
        yield from self.repeats(preview)
        if preview.categories:
            yield from self.title("Categories")
            most = max(category.documents for category in preview.categories if not category.rest)
            total = sum(category.documents for category in preview.categories)
            for category in preview.categories:
                share = f"{category.documents:9,}  {category.documents / total:6.1%}"
                drawn = "" if category.rest else "  " + bar(category.documents, most)
                yield f"  {self.fitted(category.name, 26)} {share}{drawn}"
        yield from self.title("Worth a look", "" if preview.looks else "nothing was seen")
        for found in preview.looks:
            yield from self.found(found)

    def row(self, row: Shown) -> Iterator[str]:
        yield ""
        yield "  " + self.styled(DIM, f"{visible(row.origin)}   {row.tokens:,} tokens, {row.trained:,} learned")
        written = "".join(self.stretch(one) for one in row.stretches)
        yield from (f"  | {line}" for line in written.split("\n"))
        yield f"  = {self.one_line(secrets.shortened(row.learned, LEARNED))}"

    def stretch(self, stretch: Stretch) -> str:
        if stretch.left_out:
            return self.styled(DIM, f" [... {stretch.left_out:,} tokens ...] ")
        shown = visible(stretch.text if len(stretch.text) <= LONGEST else middle_left_out(stretch.text))
        if not self.colour:
            for bracket in (OPEN, CLOSE):  # a row cannot write the marks itself
                shown = shown.replace(bracket, f"\\u{{{ord(bracket):x}}}")
            return f"{OPEN}{shown}{CLOSE}" if stretch.trained else shown
        if not stretch.trained:
            return shown
        return "\n".join(self.styled(TRAINED, line) for line in shown.replace("\n", "\u21b5\n").split("\n"))

    def counts(self, preview: Preview) -> Iterator[str]:
        for name in COUNTED:
            yield f"  {name.replace('_', ' '):<16} {preview.counts[name]:>14,}"

    def lengths(self, preview: Preview) -> Iterator[str]:
        about = preview.lengths
        note = f"tokens of a document; median {about.median:,}, longest {about.longest:,}"
        yield from self.title("Lengths", note)
        most = max(about.documents)
        for low, high, documents in zip(about.edges, about.edges[1:], about.documents, strict=False):
            yield f"  {f'{low:,} - {high - 1:,}':>20} {documents:9,}  {bar(documents, most)}".rstrip()
            if high == about.limit + 1:
                over = f", {about.over:,} documents over it" if about.over else ", and none is longer"
                yield self.styled(DIM, f"  {'':>20} max_seq_len {about.limit:,}{over}")

    def packing(self, preview: Preview) -> Iterator[str]:
        counts = preview.counts
        what = "packed" if preview.packing else "one document each"
        yield f"  {counts['packed_rows']:,} rows of {preview.max_seq_len:,} tokens an epoch, {what}"
        yield f"  {counts['fill']:.2%} full, {preview.documents_per_row:.1f} documents a row"

    def repeats(self, preview: Preview) -> Iterator[str]:
        counts = preview.counts
        yield from self.title("Repeats")
        for words, number, twins in (
            ("exact duplicates", counts["duplicates"], preview.duplicates),
            ("near duplicates", counts["near_duplicates"], preview.near_duplicates),
            ("in train and eval", counts["overlap"], preview.overlap),
        ):
            yield f"  {words:<24} {number:>9,}"
            for pair in twins:
                yield from self.pair(pair)
        if preview.near_overlap:
            yield f"  {'nearly the same, on both sides of the hold-out':<24} {preview.near_overlap:,}"

    def pair(self, pair: Twins) -> Iterator[str]:
        alike = f"{pair.similarity:.0%} like"
        for note, origin, said in (("", pair.origin, pair.text), (alike, pair.twin_origin, pair.twin_text)):
            yield f"    {note:>9} {self.styled(DIM, visible(origin))}  {self.fitted(said, EXCERPT).rstrip()}"

    def found(self, found: Found) -> Iterator[str]:
        yield f"  {found.count:>7,}  {found.words}"
        for origin, said in found.rows:
            yield f"           {self.styled(DIM, visible(origin))}  {self.fitted(said, EXCERPT).rstrip()}"

    def one_line(self, text: str) -> str:
        return visible(text).replace("\n", "\u21b5").replace("\t", " ")

    def fitted(self, text: str, columns: int) -> str:
        """A text on one line of so many columns: cut, or filled up with spaces."""
        line = " ".join(visible(secrets.hidden(text)).split())
        if width(line) > columns:
            while width(line) > columns - 3:
                line = line[: len(line) - max(1, (width(line) - columns + 3) // 2)]
            line += "..."
        return line + " " * (columns - width(line))


def middle_left_out(text: str) -> str:
    return f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 4 :]}"


def width(text: str) -> int:
    """The columns that a text takes on a terminal."""
    return sum(
        0 if unicodedata.category(one) in NO_WIDTH else 1 + (unicodedata.east_asian_width(one) in ("W", "F"))
        for one in text
    )


COUNTED = (
    "rows",
    "skipped",
    "dropped",
    "truncated",
    "duplicates",
    "near_duplicates",
    "overlap",
    "train_documents",
    "eval_documents",
    "tokens",
    "trained_tokens",
)


def bar(part: float, most: float) -> str:
    """A bar in eighths of a character."""
    eighths = round(8 * BAR * part / max(1, most))
    return "\u2588" * (eighths // 8) + ("", *"\u258f\u258e\u258d\u258c\u258b\u258a\u2589")[eighths % 8]
