"""Files -> rows: whatever the kind of file and however it is cut, the rows are those that a plain reading finds."""

import json
import random
import string
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune.data import sources
from minitune.data.conversations import json_in
from minitune.data.looks import visible
from minitune.data.objects import TWICE, RowError
from minitune.data.readers import SLICES, chunks, origin, row_at, rows, rows_of
from minitune.data.sources import find
from minitune.errors import UserError

TWO = '{"a":1,"a":2}'
LINE_ENDS = ["\n", "\r", "\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(st.sampled_from('a"\\[]{},: \né😀\u2028'), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(st.sampled_from('ab"\\]},'), max_size=4), values, max_size=4)


def cut(path: Path, size: int) -> list[Any]:
    """All rows, read in chunks of about `size` bytes, each once more by its place; errors as their sentences."""
    found = []
    for chunk in chunks(path, size):
        for place, row in rows_of(chunk):
            again = row_at(path, place)
            assert (str(again) if isinstance(again, RowError) else again) == (
                str(row) if isinstance(row, RowError) else row
            )
            found.append((place.number, str(row) if isinstance(row, RowError) else row))
    return found


# ---- however it is cut


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(objects, max_size=8), st.integers(1, 60), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_a_json_list_is_read_as_json_reads_it(tmp_path, content, size, indent, ascii, bom):
    path = tmp_path / "rows.json"
    text = json.dumps(content, indent=indent, ensure_ascii=ascii)
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode("utf-8", "surrogatepass"))
    assert cut(path, size) == list(enumerate(json.loads(text), 1))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(objects, max_size=8), st.integers(1, 60), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
def test_lines_are_read_as_json_reads_them(tmp_path, content, size, end, bom):
    path = tmp_path / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in content)
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode("utf-8", "surrogatepass"))
    step = end.count("\n")
    assert cut(path, size) == [(1 + step * number, row) for number, row in enumerate(content)]
    assert [row for _, row in rows(path)] == content


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["", " ", "a", "b c", "d\u2028", "\r"]), max_size=14), st.integers(1, 12), st.booleans()
)
def test_text_is_the_same_however_it_is_cut(tmp_path, lines, size, bom):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" * bom + "\n".join(lines).encode())
    assert cut(path, size) == cut(path, 1 << 20)
    said = "".join(row["text"] for _, row in rows(path))
    assert said.replace("\n", "") == "".join(line.strip("\r") for line in lines if line.strip())


def test_every_line_break_inside_a_string_stays_there(tmp_path):
    """The control is str.splitlines, which takes each of them for the end of a row."""
    draw = random.Random(0)
    content = [
        {"text": "".join(draw.choices(string.ascii_letters, k=9)) + draw.choice(LINE_ENDS) + str(number)}
        for number in range(1000)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    assert [row for _, row in rows(tmp_path / "rows.jsonl")] == content
    assert len(text.splitlines()) > 1000


def test_a_bad_element_of_a_list_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": 1}, {"a": nope}, 7, {"a": "\xff"}, {"a": "}]"} ,, {"a": {"b": []}}]')
    for size in (1, 1 << 20):
        assert cut(path, size) == [
            (1, {"a": 1}),
            (2, "not valid JSON at column 7: Expecting value"),
            (3, "a number, not an object"),
            (4, "not valid UTF-8 at byte 8"),
            (5, {"a": "}]"}),
            (6, "not valid JSON at column 1: Expecting value"),
            (7, {"a": {"b": []}}),
        ]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from('abc"\\é'), values), max_size=5),
    st.sampled_from(["jsonl", "json"]),
    st.booleans(),
)
def test_a_key_that_stands_twice_is_named(tmp_path, pairs, suffix, inside):
    """JSON itself keeps the last of them, which is the control."""
    written = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs) + "}"
    written = f'{{"a": [1, {written}], "b": {{"a": 2}}}}' if inside else written
    path = tmp_path / f"rows.{suffix}"
    path.write_text(f"[{written}, {{}}]" if suffix == "json" else f"{written}\n{{}}\n")
    [(_, row), (_, after)] = rows(path)
    names = [name for name, _ in pairs]
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    assert after == {}
    if twice is None:
        assert row == json.loads(written)
    else:
        place = "a[1]." if inside else ""
        assert (row.key, row.reason) == (place + visible(twice), "is given twice in one object")
        assert isinstance(json.loads(written), dict)


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ('{"messages": [{"content": "?"}, {"content": "a", "role": "b", "content": "c"}]}', "messages[1].content"),
        ('{"a": {"b": [[], [{"c": {"d": 1, "d": 2}}]]}, "a": 3}', "a.b[1][0].c.d"),
        ('{"a": [{"b": 1}], "c": {"a": [], "b": 1}, "c": 1}', "c"),
        (r'{"\u001b[2J\u001b]0;x\u0007": 1, "\u001b[2J\u001b]0;x\u0007": 2}', r"\u{1b}[2J\u{1b}]0;x\u{7}"),
        (r'{"a": {"\n\t\u202e\ud800": 1, "\n\t\u202e\ud800": 2}}', r"a.\n\t\u{202e}\u{d800}"),
        ('{"' + "k" * 10_000 + '": {"z": 1, "z": 2}}', "k" * 77 + "..." + "k" * 38 + ".z"),
        ('{"a": ' * 300 + '{"z": 1, "z": 2}' + "}" * 300, ("a." * 39)[:77] + "..." + ".a" * 19 + ".z"),
    ],
)
def test_a_key_that_stands_twice_is_named_by_its_path(tmp_path, written, key):
    """Cut and escaped: a terminal would obey what is in it."""
    path = tmp_path / "rows.jsonl"
    path.write_text(written + "\n")
    [(_, row)] = rows(path)
    assert (row.key, str(row)) == (key, f"{key} {TWICE}")
    assert str(row).isprintable() and len(str(row)) < 200


BEFORE = '{"a": {"k": 1, "k": 2}, '


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (BEFORE + "bad", "not valid JSON at column 25"),
        ('[{"k": 1, "k": 2},', "not valid JSON at column 19"),
        (BEFORE + '"b": ' + "9" * 5000 + "}", "not readable JSON: Exceeds the limit"),
        (BEFORE + '"b": ' + "[" * 100_000, "not readable JSON: maximum recursion depth"),
        (BEFORE + '"b": 1}', f"a.k {TWICE}"),
    ],
)
def test_what_is_broken_behind_a_key_that_stands_twice_is_told_of_the_row(tmp_path, written, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{written}\n{{}}\n")
    [(_, row), (_, after)] = rows(path)
    assert isinstance(row, RowError) and str(row).startswith(reason)
    assert after == {}
    with pytest.raises(RowError, match=r"is JSON in which|is not") as error:
        json_in(written, "tools")
    assert error.value.key == "tools"


def test_in_a_list_it_is_told_of_the_row_too(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"[{BEFORE} bad}}, {{}}]")
    [(_, row), (_, after)] = rows(path)
    assert isinstance(row, RowError) and row.reason.startswith("not valid JSON") and after == {}


def test_no_depth_gets_past(tmp_path):
    """Every depth around the parser's limit, with a key that stands twice and without: a row, or why there is none."""
    path = tmp_path / "rows.jsonl"
    limit = sys.getrecursionlimit()
    deep = ['{"a":' * depth + inner + "}" * depth for depth in range(limit - 150, limit) for inner in (TWO, "1")]
    path.write_text("\n".join(deep))
    found = [row for _, row in rows(path)]
    reasons = {row.reason[:17] for row in found if isinstance(row, RowError)}
    assert len(found) == len(deep) and reasons == {TWICE[:17], "not readable JSON"}


@pytest.mark.parametrize("content", [b"", b"{}", b'"[]"', b'[{"a": 1}', b'[{"a": "]}', b"[1] [2]", b"[{]"])
def test_what_is_no_list_is_refused(tmp_path, content):
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(UserError, match=r"rows.json: (holds|its list is not closed|something follows)"):
        list(rows(tmp_path / "rows.json"))


def test_no_more_than_a_chunk_is_read_at_once(tmp_path):
    """Chunks follow one another through the whole file and are about as long as asked for."""
    content = [{"text": "x" * 50, "n": number} for number in range(2000)]
    for name, text in (
        ("rows.json", json.dumps(content)),
        ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in content)),
        ("rows.txt", "\n\n".join(row["text"] for row in content)),
    ):
        path = tmp_path / name
        path.write_text(text)
        found = list(chunks(path, 1000))
        assert max(chunk.stop - chunk.start for chunk in found) < 1200
        assert all(0 <= after.start - before.stop <= 1 for before, after in pairwise(found))
        assert found[-1].stop >= len(text) - 1


# ---- parquet


@pytest.fixture
def parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(content: list[dict], group: int = 3) -> Path:
        parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "rows.parquet", row_group_size=group)
        return tmp_path / "rows.parquet"

    return write


CHAT = [
    {
        "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"é{n}", "train": n > 3}],
        "tags": ["a"] * (n % 3),
    }
    for n in range(10)
]


@pytest.mark.parametrize("group", [1, 3, 100])
def test_parquet_rows_are_those_that_were_written(parquet, group):
    path = parquet(CHAT, group)
    for message in (message for row in CHAT for message in row["messages"]):
        message.setdefault("train", None)  # a column is there for all or none
    assert cut(path, 1 << 20) == list(enumerate(CHAT, 1))
    assert len(list(chunks(path))) == -(-10 // group)
    assert origin(path, 4) == f"{path} row 4"


def test_a_large_row_group_is_cut_in_slices(parquet):
    content = [{"text": f"row {number}" * 20} for number in range(500)]
    path = parquet(content, 250)
    for size, slices in ((1, SLICES), (1 << 30, 1)):
        some = list(chunks(path, size))
        assert [chunk.start for chunk in some] == [0, *(chunk.stop for chunk in some[:-1])]
        assert len(some) == 2 * slices
    assert cut(path, 1) == cut(path, 1 << 30) == list(enumerate(content, 1))


def test_parquet_that_gives_a_name_twice_is_refused(parquet, tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    parquet(CHAT)  # skips where there is no pyarrow
    path, text = tmp_path / "twice.parquet", pyarrow.array(["a"])
    write_table(pyarrow.table([text, text, text], ["text", "note", "text"]), path)
    with pytest.raises(UserError, match=r"two columns of one name: text; rename"):
        list(rows(path))
    turn = pyarrow.StructArray.from_arrays([text, text], ["role", "role"])
    write_table(pyarrow.table([turn], ["messages"]), path)
    with pytest.raises(UserError, match=r"twice\.parquet.*duplicate field names"):
        list(rows(path))


def test_a_file_that_is_no_parquet_is_refused(parquet, tmp_path):
    data = parquet(CHAT).read_bytes()
    for content in (b"PAR1 nothing", data[:-9], b""):
        (tmp_path / "rows.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"rows.parquet: not a parquet file"):
            list(rows(tmp_path / "rows.parquet"))


def test_parquet_without_its_extra_says_how_to_get_it(parquet, monkeypatch):
    path = parquet(CHAT)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'minitune\[parquet\]'"):
        list(rows(path))


# ---- on the Hub


@pytest.mark.parametrize(
    ("name", "repo", "file", "revision"),
    [
        ("hf://datasets/owner/name/train.jsonl", "owner/name", "train.jsonl", None),
        ("hf://datasets/o/n@v1.0/data/a b.parquet", "o/n", "data/a b.parquet", "v1.0"),
        ("hf://datasets/o/n@refs/pr/3/train.json", "o/n", "train.json", "refs/pr/3"),
        (
            "hf://datasets/o/n@refs/convert/parquet/default/train/0.parquet",
            "o/n",
            "default/train/0.parquet",
            "refs/convert/parquet",
        ),
        ("hf://datasets/o/n@feature%2Fx/train.txt", "o/n", "train.txt", "feature/x"),
    ],
)
def test_names_on_the_hub_are_read_as_the_hub_writes_them(tmp_path, monkeypatch, name, repo, file, revision):
    asked = []

    def download(repo_id: str, filename: str, repo_type: str, revision: str | None) -> str:
        asked.append((repo_id, filename, repo_type, revision))
        return str(tmp_path / "file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find([name, name]) == {name: tmp_path / "file"}
    assert asked == [(repo, file, "dataset", revision)]
    if not hasattr(huggingface_hub, "parse_hf_uri"):
        pytest.skip("this version of the library does not read such names")
    theirs = huggingface_hub.parse_hf_uri(name)  # the reference
    assert (theirs.id, theirs.path_in_repo, theirs.revision) == (repo, file, revision)


@pytest.mark.parametrize(
    "name", ["hf://datasets/name/train.jsonl", "hf://o/n/train.jsonl", "https://h/train.jsonl", "s3://b/k.json"]
)
def test_other_addresses_are_refused(name):
    with pytest.raises(UserError, match=r"hf://datasets/OWNER/NAME/path/file.jsonl"):
        find([name])


def test_passwords_in_addresses_are_not_repeated():
    with pytest.raises(UserError) as refused:
        find(["https://me:hunter2@host/train.jsonl"])
    assert "hunter2" not in str(refused.value) and "host/train.jsonl" in str(refused.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "accept its terms there first, and for your token in HF_TOKEN"),
        ("RepositoryNotFoundError", "the Hub has no data set o/n, or shows it only to your token"),
        ("RevisionNotFoundError", "the data set has no revision v2"),
        ("EntryNotFoundError", "the data set o/n has no file train.jsonl"),
        ("LocalEntryNotFoundError", "the Hub cannot be reached"),
        ("OfflineModeIsEnabled", "cannot be fetched"),
        ("HFValidationError", "cannot be fetched"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_a_sentence(monkeypatch, error, words):
    from huggingface_hub import errors

    def download(*rest: object, **more: object) -> str:
        kind = getattr(errors, error)
        raise kind.__new__(kind)  # whatever its constructor wants

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=words) as refused:
        find(["hf://datasets/o/n@v2/train.jsonl"])
    assert "\n" not in str(refused.value) and "hf_secret" not in str(refused.value)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch, tmp_path):
    """The library itself, told to stay offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"the Hub cannot be reached, and the file has not been downloaded before"):
        find(["hf://datasets/o/n/train.jsonl"])
    assert sources.find([]) == {}
