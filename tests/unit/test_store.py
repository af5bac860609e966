"""The store: the same whoever makes it, found by what it was made from, whole or not there, verified before use."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minitune
from minitune.config import DataConfig
from minitune.data import prepare, store, tokenise, workers
from minitune.data.duplicates import KEYS
from minitune.data.objects import RowError
from minitune.data.readers import Chunk
from minitune.data.store import Sketches, Source, key_of, open_store
from minitune.data.templates import Document
from minitune.data.tokenise import Task
from minitune.data.workers import restored, stated
from minitune.errors import Interrupted, RunFailed, UserError
from minitune.pretrained import TINY
from minitune.tokenizer import Tokenizer, build, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


def write_rows(path: Path, rows: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    with open(path, "w") as file:
        for number in range(rows):
            said = " ".join(draw.choices(["red", "lamp", "Alice", "sends", "seven", "chairs", "to", "Paris"], k=20))
            file.write(
                json.dumps({"instruction": f"Order {number}: {said}", "output": f"{number} {said[::-1]}"}) + "\n"
            )
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 500)


def recipe(rows: Path, **more: object) -> DataConfig:
    return replace(DataConfig(train=(str(rows),), cache=str(rows.parent / "cache")), **more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stores(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def counted_tokenising(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every store that is made."""
    made: list[int] = []
    real = store.tokenised
    monkeypatch.setattr(store, "tokenised", lambda *rest: made.append(1) or real(*rest))
    return made


# ---- the same whoever makes it


@pytest.mark.parametrize("few", [2, 3])
def test_processes_make_what_one_makes(
    rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """Three of them, of which this is one or not."""
    with open(rows, "a") as file:
        file.write('{"instruction": "?"}\nnot json\n')
    cfg = recipe(rows, bad_rows="skip")
    alone = prepare(cfg, tokenizer).store
    parts: list[str] = []
    for kind in (workers.Worker, workers.Here):
        counted = lambda self, task, real=kind.portion: parts.append(type(self).__name__) or real(self, task)  # noqa: E731
        monkeypatch.setattr(kind, "portion", counted)
    monkeypatch.setattr(workers, "FEW", few)
    monkeypatch.setattr(store, "SMALLEST", 4000)
    monkeypatch.setattr(store, "CHUNK", 4000)
    monkeypatch.setattr(store, "WORTH_A_PROCESS", 4000)
    monkeypatch.setattr(store, "cores", lambda: 3)
    together = prepare(replace(cfg, cache=str(rows.parent / "another")), tokenizer).store
    assert len(parts) > 10
    assert set(parts) == ({"Worker", "Here"} if few == 3 else {"Worker"})
    assert contents(alone.folder) == contents(together.folder)
    assert len(list(together.reasons())) == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_many_parts_have_a_progress_bar_on_a_terminal(
    rows: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
) -> None:
    for size in ("SMALLEST", "CHUNK", "WORTH_A_PROCESS"):
        monkeypatch.setattr(store, size, 4000)
    monkeypatch.setattr(store, "cores", lambda: 2)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    prepare(recipe(rows), tokenizer)
    assert ("tokenising: 100%" in capsys.readouterr().err) == terminal


def test_a_tokenizer_arrives_whole(tokenizer: Tokenizer) -> None:
    again = restored(json.loads(json.dumps(stated(tokenizer))))
    assert stated(again) == stated(tokenizer)
    for text in ("Order 7: two lamps", " ünï \u200b 模型", "<s> </s>"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode_continuation(text) == tokenizer.encode_continuation(text)


def test_no_process_imports_torch() -> None:
    line = "import minitune.data.workers, sys; assert not {'torch', 'bitsandbytes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", line], check=True)


def test_what_a_process_cannot_do_is_said(rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SMALLEST", 4000)
    monkeypatch.setattr(store, "CHUNK", 4000)
    monkeypatch.setattr(store, "WORTH_A_PROCESS", 4000)
    monkeypatch.setattr(store, "cores", lambda: 2)
    cfg = recipe(rows, template="chat")
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        prepare(cfg, replace(tokenizer, chat_template=None))

    def killed(self: workers.Worker, task: object) -> object:
        self.process.kill()
        return real(self, task)

    real = workers.Worker.portion
    monkeypatch.setattr(workers.Worker, "portion", killed)
    with pytest.raises(RunFailed, match=r"a process that tokenises .*rows.jsonl has ended \(exit code -9\)"):
        prepare(recipe(rows), tokenizer)
    assert stores(rows.parent / "cache") == []


GIVES_UP = {  # on 600 letters; its library tries no more than so many ways
    "type": "Split",
    "pattern": {"Regex": "[ab]+[ab]+[ab]+[ab]+[cd]"},
    "behavior": "Isolated",
    "invert": False,
}


@pytest.fixture
def impatient(tokenizer: Tokenizer) -> Tokenizer:
    """The tiny model's, cut by a pattern that its library gives up on for some texts."""
    state = json.loads(tokenizer.engine.to_str())
    state["pre_tokenizer"]["pretokenizers"].insert(0, GIVES_UP)
    engine = build(state, Path("tokenizer.json"))
    return replace(tokenizer, engine=engine, continuation=engine)


@pytest.mark.parametrize(("where", "template"), [("here", "alpaca"), ("workers", "chat")])
def test_a_text_that_the_tokenizer_gives_up_on_is_a_bad_row(
    rows: Path, tokenizer: Tokenizer, impatient: Tokenizer, monkeypatch: pytest.MonkeyPatch, where: str, template: str
) -> None:
    """What is raised there is no Exception; the other rows of its batch lose nothing."""
    with pytest.raises(BaseException, match="retry-limit") as error:
        impatient.engine.encode("ab" * 300)
    assert not isinstance(error.value, Exception)
    for size in ("SMALLEST", "CHUNK", "WORTH_A_PROCESS"):
        monkeypatch.setattr(store, size, 4000)
    monkeypatch.setattr(store, "cores", lambda: 1 if where == "here" else 3)
    monkeypatch.setattr(workers, "FEW", 1)
    good = prepare(recipe(rows, template=template), tokenizer)
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:250], json.dumps({"instruction": "?", "output": "ab" * 300}), *lines[250:]]))
    got = prepare(recipe(rows, template=template, bad_rows="skip"), impatient)
    [(entry, _, reason)] = got.store.reasons()
    assert got.store.origin(entry) == f"{rows}:251"
    assert reason.startswith("the tokenizer's pattern gives up on its text: ") and "retry-limit" in reason
    assert (got.counts["rows"], got.counts["skipped"]) == (501, 1)
    assert got.train.digest == good.train.digest


def test_whatever_ends_a_worker_is_said(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def panics(*rest: object) -> None:
        raise Panic("the library gave up")

    monkeypatch.setattr(workers, "tokenise", panics)
    out = io.BytesIO()
    workers.answer(out, Task(Chunk("rows.jsonl", 0, 1, 1), 0, "alpaca"), DataConfig(), tokenizer)
    assert "Panic: the library gave up" in json.loads(out.getvalue())["error"]


# ---- found by what it was made from


def changes(rows: Path, cfg: DataConfig, tokenizer: Tokenizer) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """One thing changed at a time: what is then given to `key_of`."""
    source = Source(str(rows), rows, "d" * 64, "alpaca")
    other_engine = load_tokenizer(TINY)
    other_engine.engine.add_special_tokens(["<new>"])
    return {
        "nothing": lambda: ([source], cfg, tokenizer),
        "file": lambda: ([replace(source, digest="e" * 64)], cfg, tokenizer),
        "another file": lambda: ([source, source], cfg, tokenizer),
        "suffix": lambda: ([replace(source, path=rows.with_suffix(".txt"))], cfg, tokenizer),
        "format": lambda: ([replace(source, format="text")], cfg, tokenizer),
        "columns": lambda: ([source], replace(cfg, columns={"a": "text"}), tokenizer),
        "template": lambda: ([source], replace(cfg, template="chat"), tokenizer),
        "train_on_prompt": lambda: ([source], replace(cfg, train_on_prompt=True), tokenizer),
        "max_seq_len": lambda: ([source], replace(cfg, max_seq_len=99), tokenizer),
        "overlong": lambda: ([source], replace(cfg, overlong="truncate"), tokenizer),
        "category": lambda: ([source], replace(cfg, category="kind"), tokenizer),
        "sketches": lambda: ([source], replace(cfg, near_duplicates="off"), tokenizer),
        "chat template": lambda: ([source], cfg, replace(tokenizer, chat_template="{{ 1 }}")),
        "eos": lambda: ([source], cfg, replace(tokenizer, eos_id=5)),
        "bos": lambda: ([source], cfg, replace(tokenizer, adds_bos=not tokenizer.adds_bos)),
        "engine": lambda: ([source], cfg, other_engine),
    }


def test_all_that_matters_is_in_the_key(rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {name: key_of(*change()) for name, change in changes(rows, recipe(rows), tokenizer).items()}
    monkeypatch.setattr(store, "code_digest", lambda: "other code")
    keys["code"] = key_of(*changes(rows, recipe(rows), tokenizer)["nothing"]())
    assert len(set(keys.values())) == len(keys), keys


def test_nothing_else_is(rows: Path, tokenizer: Tokenizer) -> None:
    cfg = recipe(rows)
    source = Source(str(rows), rows, "d" * 64, "alpaca")
    key = key_of([source], cfg, tokenizer)
    moved = Source("elsewhere.jsonl", Path("elsewhere.jsonl"), "d" * 64, "alpaca")
    harmless = {"eval_fraction": 0.5, "packing": False, "bad_rows": "skip", "deduplicate": False, "cache": "none"}
    harmless |= {"near_duplicates": "remove", "checks": "warn", "weights": (2.0,)}
    for name, value in harmless.items():
        assert key_of([moved], replace(cfg, **{name: value}), load_tokenizer(TINY)) == key


def test_a_template_that_writes_the_date_is_made_anew_each_day(
    rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(store.date):
        @classmethod
        def today(cls) -> store.date:
            return cls(2100, 1, 1)

    dated = replace(tokenizer, chat_template="{{ strftime_now('%d %b %Y') }}")
    plain = replace(tokenizer, chat_template="{{ 1 }}")
    source = Source(str(rows), rows, "d" * 64, "alpaca")
    before = [key_of([source], recipe(rows), each) for each in (dated, plain)]
    monkeypatch.setattr(store, "date", Tomorrow)
    after = [key_of([source], recipe(rows), each) for each in (dated, plain)]
    assert (before[0] != after[0], before[1] != after[1]) == (True, False)


def test_rows_are_tokenised_once(rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted_tokenising(monkeypatch)
    first = prepare(recipe(rows), tokenizer)
    again = prepare(recipe(rows, eval_fraction=0.3), tokenizer)
    assert len(made) == 1
    assert (first.store.folder, first.train.marked_digest) == (again.store.folder, again.train.marked_digest)
    write_rows(rows, 501)
    assert prepare(recipe(rows), tokenizer).counts["rows"] == 501
    assert len(made) == 2


def test_without_a_cache_nothing_is_left(rows: Path, tokenizer: Tokenizer) -> None:
    got = prepare(recipe(rows, cache="none"), tokenizer)
    folder = got.store.folder
    assert folder.is_dir() and got.train[3][0].size
    assert not (rows.parent / "cache").exists()
    del got
    assert not folder.exists()


def test_the_cache_is_where_the_user_has_caches(rows: Path, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(rows.parent / "xdg"))
    folder = prepare(recipe(rows, cache="auto"), tokenizer).store.folder
    assert folder.parent == rows.parent / "xdg/minitune/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(rows.parent / "home"))
    assert (
        prepare(recipe(rows, cache="auto"), tokenizer).store.folder.parent == rows.parent / "home/.cache/minitune/data"
    )
    (rows.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache: .*file cannot be written to"):
        prepare(recipe(rows, cache=str(rows.parent / "file")), tokenizer)


# ---- verified before use


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "manifest json"])
def test_a_damaged_store_is_made_again(
    rows: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = prepare(recipe(rows), tokenizer).store.folder
    before = contents(folder)
    if damage == "flip":
        data = bytearray((folder / "marked").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "marked").write_bytes(data)
    elif damage == "truncate":
        os.truncate(folder / "start", 8)
    elif damage == "remove":
        (folder / "content").unlink()
    elif damage == "manifest":
        (folder / "store.json").unlink()
    else:
        (folder / "store.json").write_text('{"files": [')
    made = counted_tokenising(monkeypatch)
    prepare(recipe(rows), tokenizer)
    assert len(made) == 1
    assert contents(folder) == before


def test_a_file_that_changes_meanwhile_is_refused(rows: Path, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    real = store.tokenised

    def changing(*rest: Any) -> Any:
        yield from real(*rest)
        with open(rows, "a") as file:
            file.write("{}\n")

    monkeypatch.setattr(store, "tokenised", changing)
    with pytest.raises(UserError, match=r"rows.jsonl was changed while it was read"):
        prepare(recipe(rows), tokenizer)
    assert stores(rows.parent / "cache") == []


# ---- whole or not there

BUILD = """
import sys
from pathlib import Path
from minitune.config import DataConfig
from minitune.data import prepare, store
from minitune.tokenizer import load_tokenizer
store.SMALLEST = store.CHUNK = store.WORTH_A_PROCESS = 20_000
store.cores = lambda: 2
print("begun", flush=True)
got = prepare(DataConfig(train=(sys.argv[1],), cache=sys.argv[2]), load_tokenizer(Path(sys.argv[3])))
print(got.train.digest, flush=True)
"""


def building(rows: Path, cache: Path) -> subprocess.Popen[str]:
    where = {"PYTHONPATH": str(Path(minitune.__file__).parents[1])}
    line = [sys.executable, "-c", BUILD, str(rows), str(cache), str(TINY)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=os.environ | where, start_new_session=True)


def test_a_killed_process_leaves_no_store_and_no_workers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows, cache = write_rows(tmp_path / "rows.jsonl", 6000), tmp_path / "cache"
    process = building(rows, cache)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in cache.glob(".*.part/marked")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)  # that process alone: its workers must end by themselves
    process.wait()
    assert [path.name[0] for path in stores(cache)] == ["."]  # what was begun is there, and is no store
    assert children
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    other = write_rows(tmp_path / "other.jsonl", 5)
    prepare(DataConfig(train=(str(other),), cache=str(cache)), tokenizer)
    assert list(cache.glob(".*.part")) == []  # whoever comes next clears it away
    got = prepare(DataConfig(train=(str(rows),), cache=str(cache)), tokenizer)
    assert got.counts["rows"] == 6000
    assert len(stores(cache)) == 2


def test_two_processes_at_once_are_both_right(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows, cache = write_rows(tmp_path / "rows.jsonl", 3000), tmp_path / "cache"
    said = [process.communicate(timeout=120)[0].split() for process in [building(rows, cache) for _ in range(2)]]
    got = prepare(DataConfig(train=(str(rows),), cache=str(cache)), tokenizer)
    assert said == [["begun", got.train.digest]] * 2
    assert len(stores(cache)) == 1


# ---- leaving


def a_task(rows: Path) -> Task:
    return Task(Chunk(str(rows), 0, rows.stat().st_size, 1), 0, "alpaca")


@pytest.mark.parametrize("heeds", [True, False])
def test_what_this_process_tokenises_is_left_where_the_run_ends(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, heeds: bool
) -> None:
    """After the rows that are under way; not to heed it, which goes through all of the chunk, is the mutant."""
    made = []

    def slowly(*rest: object) -> list[list[Document]]:
        time.sleep(0.02)
        made.append(1)
        return real(*rest)

    real = tokenise.documents_of
    monkeypatch.setattr(tokenise, "AT_ONCE", 1)
    monkeypatch.setattr(tokenise, "documents_of", slowly)
    here = workers.Here(DataConfig(), tokenizer)
    if not heeds:
        monkeypatch.setattr(workers.Here, "end", lambda self: None)

    def tasks() -> Iterator[Task]:
        yield a_task(write_rows(tmp_path / "rows.jsonl", 60))
        while not made:
            time.sleep(0.001)
        raise Interrupted(signal.SIGTERM, "stopped")

    with pytest.raises(Interrupted):
        list(workers.shared_out(tasks(), [here], []))
    assert (len(made) < 10) if heeds else (len(made) == 60)


def test_a_dead_worker_is_told_of_before_earlier_work_is_done(rows: Path) -> None:
    class Slow:
        def __init__(self) -> None:
            self.ended = threading.Event()

        def portion(self, task: Task) -> None:
            self.in_time = self.ended.wait(20)

        def end(self) -> None:
            self.ended.set()

    class Dead(Slow):
        def portion(self, task: Task) -> None:
            raise RunFailed("a process has ended")

    slow = Slow()
    with pytest.raises(RunFailed, match="a process has ended"):
        list(workers.shared_out([a_task(rows)] * 2, [slow], [Dead()]))
    assert slow.in_time


@pytest.mark.parametrize("ends", ["before the answer", "in the middle of a task"])
def test_a_worker_whose_giver_of_work_has_ended_leaves_without_a_word(
    tmp_path: Path, tokenizer: Tokenizer, ends: str
) -> None:
    task = json.dumps(asdict(a_task(write_rows(tmp_path / "rows.jsonl", 3000)))).encode() + b"\n"
    where = os.environ | {"PYTHONPATH": str(Path(minitune.__file__).parents[1])}
    worker = subprocess.Popen(
        [sys.executable, "-c", "from minitune.data.workers import work; work()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=where,
    )
    workers.send(worker.stdin, {"cfg": asdict(DataConfig()), "tokenizer": stated(tokenizer)})
    worker.stdin.write(task if ends == "before the answer" else task[:20])
    worker.stdout.close()
    worker.stdin.close()
    assert worker.stderr.read() == b""
    worker.stderr.close()
    worker.wait(timeout=60)


# ---- reading


def test_rows_and_tokens_are_found_again(rows: Path, tokenizer: Tokenizer) -> None:
    with open(rows, "a") as file:
        file.write("not json\n")
    got = prepare(recipe(rows, bad_rows="skip"), tokenizer)
    lines = rows.read_text().splitlines()
    for entry in (0, 7, 499):
        assert got.store.row(entry) == json.loads(lines[entry])
        assert got.store.origin(entry) == f"{rows}:{entry + 1}"
        ids, trained = got.store.tokens(entry)
        assert tokenizer.decode(ids[trained].tolist()) == json.loads(lines[entry])["output"]
    assert isinstance(got.store.row(500), RowError)
    for corpus, entries in ((got.train, got.train_entries), (got.eval, got.eval_entries)):
        for document in (0, len(corpus) - 1):
            ids, trained = corpus[document]
            again = got.store.tokens(entries[document])
            assert np.array_equal(ids, again[0]) and np.array_equal(trained, again[1])


def test_a_store_that_shrinks_while_it_is_read_is_noticed(rows: Path, tokenizer: Tokenizer) -> None:
    got = prepare(recipe(rows, eval_fraction=0.0), tokenizer)
    os.truncate(got.store.folder / "marked", 40)
    with pytest.raises(UserError, match="has become shorter"):
        got.train[400]


def test_sketches_are_indexed_as_an_array_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sketches, "BLOCK", 7)
    whole = np.random.default_rng(0).integers(0, 2**63, (40, KEYS)).astype(np.uint64)
    whole.tofile(tmp_path / "sketches")
    entries = np.array([31, 2, 17, 3, 39])
    some, rows = Sketches(tmp_path / "sketches", entries), np.array([4, 0, 0])
    assert len(some) == 5
    assert all(np.array_equal(some[:, key], whole[entries, key]) for key in range(KEYS))
    assert np.array_equal(some[rows], whole[entries[rows]])


def test_open_store_needs_no_more_than_its_parts(rows: Path, tokenizer: Tokenizer) -> None:
    got = prepare(recipe(rows), tokenizer)
    again = open_store(got.store.sources, recipe(rows), tokenizer)
    assert len(again) == 500
    assert again.column("number").tolist() == list(range(1, 501))
