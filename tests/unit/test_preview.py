"""The preview: what it says of rows that are known, and that no row can say anything to page or terminal."""

import base64
import errno
import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitune import views
from minitune.config import DataConfig
from minitune.data import prepare
from minitune.errors import RunFailed, UserError
from minitune.pretrained import TINY
from minitune.preview import Category, Found, Lengths, Preview, Shown, Stretch, Twins, documents, page, terminal
from minitune.preview.documents import glance, stretches
from minitune.preview.gather import lengths, preview
from minitune.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = load_tokenizer(TINY)
STORY = "Seven traders crossed the mountains east of the river with letters, salt and lamps for the winter market."


@pytest.fixture
def tokenizer() -> Tokenizer:
    return TOKENIZER


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def alpaca(instruction: str, output: str, **more: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": output, **more}


ROWS = [
    alpaca("Tell the story.", STORY, kind="tale"),
    alpaca("Tell the story.", STORY, kind="tale"),  # the same
    alpaca("Tell the story.", STORY.replace("salt", "silk"), kind="tale"),  # nearly
    alpaca("Count to three.", "one two three", kind="count"),
    alpaca("Count to four.", "one two three four", kind="count"),
    alpaca("What is it?", "What is it?", kind="odd"),
    alpaca("Who?", "I", kind="odd"),
    alpaca("Write it.", "```\nprint()", kind="odd"),
    alpaca("Read it.", "caf\ufffd", kind="odd"),
    {"instruction": "No answer."},
    alpaca("Too long.", "word " * 200, kind="long"),
    *(alpaca(f"May I have {thing}?", "I can't help with that.", kind="no") for thing in ("a map", "two keys", "salt")),
]


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    held = write(tmp_path / "held.jsonl", [alpaca("Count to three.", "one two three", kind="count")])
    train = write(tmp_path / "rows.jsonl", ROWS)
    return DataConfig((train,), eval=(held,), eval_fraction=0, max_seq_len=128, bad_rows="skip", category="kind")


@pytest.fixture
def seen(cfg: DataConfig, tokenizer: Tokenizer) -> Preview:
    return preview(prepare(cfg, tokenizer, refuse=False), cfg, tokenizer)


# ---- what is gathered ----------------------------------------------------------------------------------------------


def places(rows: list[tuple[str, str]]) -> list[str]:
    return [origin.rsplit("/", 1)[1] for origin, _ in rows]


def test_each_row_that_is_left_out_is_listed_with_its_place(seen: Preview) -> None:
    listed = {found.words: (found.count, places(found.rows)) for found in seen.left_out}
    assert listed == {
        "cannot be used": (1, ["rows.jsonl:10"]),
        "too long": (1, ["rows.jsonl:11"]),
        "the same as another": (1, ["rows.jsonl:2"]),
        "held out in data.eval, too": (1, ["rows.jsonl:4"]),
    }
    assert "output is missing" in seen.left_out[0].rows[0][1]


def test_repeats_stand_beside_what_they_repeat(seen: Preview) -> None:
    [exact], [near], [both] = seen.duplicates, seen.near_duplicates, seen.overlap
    assert places([(exact.origin, ""), (exact.twin_origin, "")]) == ["rows.jsonl:2", "rows.jsonl:1"]
    assert exact.similarity == 1 and exact.text == exact.twin_text
    assert places([(near.origin, ""), (near.twin_origin, "")]) == ["rows.jsonl:3", "rows.jsonl:1"]
    assert 0.8 < near.similarity < 1 and "silk" in near.text and "salt" in near.twin_text
    assert places([(both.origin, ""), (both.twin_origin, "")]) == ["rows.jsonl:4", "held.jsonl:1"]
    assert (seen.counts["duplicates"], seen.counts["near_duplicates"], seen.counts["overlap"]) == (1, 1, 1)


def test_rows_worth_a_look(seen: Preview) -> None:
    found = {one.words: (one.count, places(one.rows)) for one in seen.looks}
    assert found["an answer of one or two characters"] == (1, ["rows.jsonl:7"])
    assert found["the answer is the prompt again"] == (1, ["rows.jsonl:6"])
    assert found["a code fence that is opened and not closed"] == (1, ["rows.jsonl:8"])
    assert found["U+FFFD, left by text that was decoded wrongly"] == (1, ["rows.jsonl:9"])
    assert found["the same answer as in other rows"] == (3, ["rows.jsonl:12"])
    refusals = found["the answer refuses, or speaks of itself as a model"]
    assert refusals == (3, ["rows.jsonl:12", "rows.jsonl:13", "rows.jsonl:14"])
    assert len(found) == 6


def test_categories_are_those_of_the_column(seen: Preview) -> None:
    counted = {one.name: one.documents for one in seen.categories}
    assert counted == {"odd": 4, "no": 3, "tale": 2, "count": 2}  # of what is used, data.eval's row included
    assert sum(one.tokens for one in seen.categories) > sum(counted.values())


def test_a_few_categories_are_named_and_the_rest_counted_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [alpaca(f"say word{n % 20} now", f"answer {n}") for n in range(50)]
    cfg = DataConfig((write(tmp_path / "rows.jsonl", rows),), near_duplicates="off", max_seq_len=128)
    listed = preview(prepare(cfg, tokenizer), cfg, tokenizer).categories
    assert len(listed) == 13 and listed[-1].rest and sum(one.documents for one in listed) == 50
    assert not any(one.rest for one in listed[:-1])


@pytest.mark.parametrize("limit", [2, 7, 100, 512, 2048, 131072])
def test_every_document_is_in_one_bin_of_the_lengths(limit: int) -> None:
    draw = np.random.default_rng(limit)
    whole = np.concatenate([draw.integers(1, 3 * limit, 500), [1, limit, limit, limit + 1]])

    class Table:
        def column(self, name: str) -> np.ndarray:
            return {"whole": np.append(whole, [0, 0])}[name]  # rows that give no document have none

    about = lengths(Table(), limit)
    edges = np.array(about.edges)
    expected = [int(((whole >= low) & (whole < high)).sum()) for low, high in pairwise(edges)]
    assert about.documents == expected and sum(expected) == len(whole)
    fit = edges.tolist().index(limit + 1)
    assert sum(about.documents[:fit]) == (whole <= limit).sum() and about.over == (whole > limit).sum()
    assert (about.median, about.longest) == (int(np.median(whole)), whole.max())


# ---- documents as the model meets them -----------------------------------------------------------------------------


def marked(tokenizer: Tokenizer, *parts: tuple[str, bool]) -> tuple[np.ndarray, np.ndarray]:
    ids = [tokenizer.encode_continuation(text) for text, _ in parts]
    trained = [[learn] * len(some) for some, (_, learn) in zip(ids, parts, strict=True)]
    return np.array([*chain(*ids)], np.int32), np.array([*chain(*trained)], np.bool_)


def test_the_stretches_are_the_text_and_its_marks(tokenizer: Tokenizer) -> None:
    parts = [("Ask: é?\n", False), (" yes", True), ("</s>", True), ("\nAsk:", False), (" no — 中", True)]
    ids, trained = marked(tokenizer, *parts)
    written = list(stretches(ids, trained, tokenizer))
    assert [(one.text, one.trained) for one in written] == [
        ("Ask: é?\n", False),
        (" yes</s>", True),
        ("\nAsk:", False),
        (" no — 中", True),
    ]
    assert "".join(one.text for one in written) == tokenizer.decode(ids.tolist(), skip_special=False)
    wrong = list(stretches(ids, np.roll(trained, 1), tokenizer))  # the check sees marks that are off by one
    assert [one.text for one in wrong] != [one.text for one in written]


def test_a_character_across_a_seam_is_not_torn(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode_continuation("a 中 b"), np.int32)
    whole = tokenizer.decode(ids.tolist(), skip_special=False)
    for seam in range(1, len(ids)):
        written = list(stretches(ids, np.arange(len(ids)) >= seam, tokenizer))
        assert "".join(one.text for one in written) == whole and "\ufffd" not in whole


def test_the_middle_of_a_long_document_is_counted_and_not_shown(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "HEAD", 10)
    monkeypatch.setattr(documents, "TAIL", 5)
    ids = np.array(tokenizer.encode("one two three four five six seven eight nine ten " * 5), np.int32)
    trained = np.arange(len(ids)) % 20 >= 8
    written = list(stretches(ids, trained, tokenizer))
    [gap] = [one for one in written if one.left_out]
    assert gap.left_out == len(ids) - 15
    at = written.index(gap)
    assert "".join(one.text for one in written[:at]) == tokenizer.decode(ids[:10].tolist())
    assert "".join(one.text for one in written[at + 1 :]).split() == tokenizer.decode(ids[-5:].tolist()).split()


def test_the_first_rows_are_shown_and_every_file_has_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    names = tuple(
        write(tmp_path / f"{name}.jsonl", [alpaca(f"{name} {n}", f"answer {n}") for n in range(9)]) for name in "abc"
    )
    cfg = DataConfig(names, eval_fraction=0, max_seq_len=128)
    shown = preview(prepare(cfg, tokenizer), cfg, tokenizer).rows
    assert [row.origin.rsplit("/", 1)[1] for row in shown] == [
        "a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1", "c.jsonl:1",
    ]  # fmt: skip
    assert [one.text for one in shown[0].stretches if one.trained] == ["answer 0</s>"] == [shown[0].learned]


def test_a_glance_is_one_line_that_says_what_is_learned(cfg: DataConfig, tokenizer: Tokenizer) -> None:
    [line] = glance(prepare(cfg, tokenizer, refuse=False), tokenizer)
    assert "rows.jsonl:1" in line and '### Response:\\n" it learns "Seven traders' in line and "\n" not in line


# ---- what a row can do to a page or a terminal ----------------------------------------------------------------------

HOSTILE = (
    "</pre></bdi><script>alert(1)</script><img src=x onerror=alert(2)><style>*{display:none}</style>"
    "\" onmouseover='alert(3)' <!-- ]]> &lt;b&gt; javascript:alert(4)"
    "\x1b[2J\x1b[31m\x1b]0;owned\x07\x9b31m\r\x08\x7f\u202etxt\u2066\u200b\u2028\ud800 \u27e6not trained\u27e7"
)


def filled(text: str) -> Preview:
    """A preview with this text wherever a text can come from outside."""
    shown = Shown(text, 9, 4, [Stretch(text, False), Stretch(text, True), Stretch("", False, 7)], text)
    found, twins = Found("some words of ours", 3, [(text, text)]), Twins(text, text, text, text, 0.9)
    names = "rows skipped dropped truncated duplicates near_duplicates overlap train_documents eval_documents tokens"
    return Preview(
        files=[text],
        max_seq_len=64,
        packing=True,
        counts=dict.fromkeys([*names.split(), "trained_tokens", "packed_rows"], 1234) | {"fill": 0.99},
        warnings=[text],
        rows=[shown],
        left_out=[found],
        lengths=Lengths([46, 65, 91], [5, 2], 64, 50, 88, 2),
        documents_per_row=3.5,
        duplicates=[twins],
        near_duplicates=[twins],
        near_overlap=2,
        overlap=[twins],
        categories=[Category(text, 5, 50), Category("2 others", 2, 9, rest=True)],
        looks=[found],
    )


def outside_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        yield from (text for one in fields(value) for text in outside_texts(getattr(value, one.name)))
    elif isinstance(value, list | tuple):
        yield from (text for one in value for text in outside_texts(one))


class Elements(HTMLParser):
    """Every tag of a page with its attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        self.seen.append((f"/{tag}", None))

    def handle_comment(self, data: str) -> None:
        self.seen.append(("comment", data))


UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ud800-\udfff]")
COLOURS = re.compile(r"\x1b\[(30;42|1|2|0)m")


def page_is_unharmed() -> bool:
    """Whatever rows say, the page's elements are those of a page whose rows say nothing."""
    hostile, harmless = page.html(filled(HOSTILE)), page.html(filled("harmless"))
    return Elements(hostile).seen == Elements(harmless).seen and not UNSEEN.search(hostile)


def terminal_is_unharmed() -> bool:
    """Nothing but our own colours is obeyed, and only ours are the brackets."""
    coloured, plain = (terminal.text(filled(HOSTILE), colour) for colour in (True, False))
    trained = sum(one.trained for row in filled("").rows for one in row.stretches)
    inside = "".join(line for line in plain.split("\n") if line.startswith("  | "))  # the documents
    return not (UNSEEN.search(COLOURS.sub("", coloured)) or UNSEEN.search(plain)) and (
        inside.count("\u27e6") == inside.count("\u27e7") == trained
    )


def test_no_row_reaches_the_page_or_the_terminal() -> None:
    assert sum(text == HOSTILE for text in outside_texts(filled(HOSTILE))) >= 20
    assert page_is_unharmed() and terminal_is_unharmed()


def test_the_checks_see_what_is_not_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: no escaping, nothing made visible, brackets let through."""
    with monkeypatch.context() as mutant:
        mutant.setattr(page, "escape", lambda text: text)
        assert not page_is_unharmed()
    with monkeypatch.context() as mutant:
        mutant.setattr(page, "visible", lambda text: text)
        assert not page_is_unharmed()
    with monkeypatch.context() as mutant:
        mutant.setattr(terminal, "visible", lambda text: text.encode("utf-8", "replace").decode())
        assert not terminal_is_unharmed()
    with monkeypatch.context() as mutant:
        mutant.setattr(terminal, "OPEN", "(")
        assert not terminal_is_unharmed()


def test_a_hostile_row_from_its_file_to_the_page(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = HOSTILE.replace("\ud800", "")
    rows = [alpaca(text, text, kind=text), alpaca(text, text, kind=text), alpaca("x" + text, text), {text: text}]
    name = write(tmp_path / "<b>\x1b[1m.jsonl", rows)
    cfg = DataConfig((name,), format="alpaca", bad_rows="skip", category="kind", max_seq_len=2048)
    seen = preview(prepare(cfg, tokenizer, refuse=False), cfg, tokenizer)
    made = page.html(seen)
    tags = {tag for tag, _ in Elements(made).seen}
    assert not tags & {"script", "img", "b>", "comment", "iframe", "a", "link"} and not UNSEEN.search(made)
    assert [tag for tag, _ in Elements(made).seen].count("style") == 1
    assert not UNSEEN.search(terminal.text(seen, colour=False))
    assert not UNSEEN.search(COLOURS.sub("", terminal.text(seen, colour=True)))
    assert "&lt;script&gt;" in made and "\\u{1b}[2J" in made  # it is shown, and as what it is


def test_the_page_needs_nothing_and_allows_nothing() -> None:
    made = page.html(filled("text"))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', made)[1]
    style = re.search(r"<style>(.*?)</style>", made, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not re.search(r"\b(src|href|style|on\w+)=|url\(|@import|<script", made)
    elements = Elements(made).seen
    opened = Counter(tag for tag, attributes in elements if attributes is not None)
    closed = Counter(tag[1:] for tag, attributes in elements if attributes is None)
    assert set(opened - closed) <= {"!doctype", "meta", "br", "rect", "line"} and not closed - opened


def test_what_is_shown_on_one_line_still_shows_what_is_unseen() -> None:
    found = Found("words", 1, [("a:1", "first\u2028second \u200b\n\tthird")])
    seen = replace(filled("x"), looks=[found])
    for made in (page.html(seen), terminal.text(seen, colour=False)):
        assert "first\\u{2028}second \\u{200b} third" in made


def test_trained_tokens_are_marked_in_page_and_terminal() -> None:
    shown = Shown("a:1", 5, 2, [Stretch("asked ", False), Stretch("told\nit", True)], "told\nit")
    seen = replace(filled("x"), rows=[shown])
    assert "asked <mark>told\nit</mark></pre>" in page.html(seen)
    assert "asked \u27e6told\n  | it\u27e7" in terminal.text(seen, colour=False)
    coloured = terminal.text(seen, colour=True)
    assert "asked \x1b[30;42mtold\u21b5\x1b[0m\n  | \x1b[30;42mit\x1b[0m" in coloured and "\u27e6" not in coloured


@pytest.mark.parametrize(
    ("environment", "tty", "colour"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),  # no-color.org: set and not empty
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_where_there_is_colour(environment: dict[str, str], tty: bool, colour: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: tty
    assert views.in_colour(stream, environment) is colour


def test_whoever_reads_may_stop_reading() -> None:
    """As `| head` does. The control, a plain print, fails of it."""
    shown = "views.show(views.Wanted(None, False), lambda colour: 'a line\\n' * 9999, None, None)"
    for code, ended in ((shown, 0), ("print('a line\\n' * 9999)", 1)):
        process = subprocess.Popen(
            [sys.executable, "-c", f"from minitune import views; {code}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stdout.close()
        errors = process.stderr.read()
        assert (process.wait(60) > 0) == ended and ("BrokenPipeError" in errors) == ended


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("json", [True, False])
def test_what_cannot_be_printed_is_said(json: bool) -> None:
    """The control, a plain print, ends in a traceback."""
    shown = f"views.show(views.Wanted(None, {json}), lambda colour: 'a line\\n', None, dict)"
    for code, expected in ((f"errors.run(lambda _: {shown})", 1), ("print('a line', flush=True)", 0)):
        line = [sys.executable, "-c", f"from minitune import errors, views; {code}"]
        with open("/dev/full", "w") as full:
            ended = subprocess.run(line, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
        said = ended.stderr == "failed: what was found out cannot be printed (No space left on device)\n"
        assert (ended.returncode == 1 and said) == expected
        assert ("Traceback" in ended.stderr) != expected


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work where trying tells; where the disk fills up later, then."""
    with pytest.raises(UserError, match=r"--html: no file can be written in /proc"):
        views.wanted(["--html", "/proc/page.html"], "")
    wanted, rest = views.wanted(["--html", str(tmp_path / "page.html"), "a=b"], "")
    assert rest == ["a=b"] and list(tmp_path.iterdir()) == []

    def full(*rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(views.files, "write_text", full)
    with pytest.raises(RunFailed, match=r"page.html cannot be written \(No space left on device\)"):
        views.show(wanted, lambda colour: "", lambda: "<p>", dict)


def test_marks_and_joiners_take_no_column() -> None:
    for text, columns in (("สวัสดี", 4), ("e\u0301", 1), ("👨\u200d👩", 4), ("模型", 4), ("שלום", 4)):
        assert terminal.width(text) == columns


def test_columns_of_a_terminal_are_counted_by_width() -> None:
    writer = terminal.Writer(colour=False)
    for text in ("plain", "中文字符", "e\u0301a", "much longer than there is room for", "中文字符" * 9):
        assert terminal.width(writer.fitted(text, 14)) == 14
    assert terminal.bar(0, 9) == "" and len(terminal.bar(9, 9)) == terminal.BAR
