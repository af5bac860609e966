"""Tokens, keys and passwords are in nothing that a run prints or writes, however they came to it."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from safetensors.torch import load_file

from minitune import files, peft_format, secrets
from minitune.config import dump, load_config
from minitune.errors import RunFailed

ROOT = Path(__file__).parents[2]
NAMED = {  # variables, with values that no other text holds
    "HF_TOKEN": "hf_" + "CanaryCanaryCanary123",
    "HUGGING_FACE_HUB_TOKEN": "canary-hub-token-1",
    "WANDB_API_KEY": "canary0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "Canary/Secret+Key=1",
    "DATABASE_PASS": "canary-hunter2",
    "DB_PASSWORD": "canary'pass\"word\\1",
    "PGPASSWORD": "canary-pg-password",
    "MY_SECRET": "canary secret with spaces",
    "GITHUB_PAT": "canary-pat-123",
    "SMTP_PASSWD": "canary-smtp-é",
    "SESSION_COOKIE": "canary-cookie-1",
    "SSH_KEY": "-----BEGIN SSH PRIVATE KEY-----\ncanaryfirstline\ncanarysecondline\n-----END SSH PRIVATE KEY-----",
    "API_TOKEN2": "canary-api-token-2",
    "apiKey": "canary-camel-key",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in NAMED.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("form", [str, quote, lambda value: quote(value, safe=""), repr, json.dumps])
def test_values_of_the_environment_are_hidden(environment, name, form):
    text = secrets.hidden(f"before {form(NAMED[name])} after")
    assert "anary" not in text and text.startswith("before ") and text.endswith(" after")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://user:canary@host/x", "https://[hidden]@host/x"),
        ("https://user:can/ary@host/x", "https://[hidden]@host/x"),
        ("https://user:can@ary@host/x", "https://[hidden]@host/x"),
        ("postgres://canary@db:5432/x", "postgres://[hidden]@db:5432/x"),
        ("'https://:canary@host/x'", "'https://[hidden]@host/x'"),
        ("https://host/x?token=canary&a=1", "https://host/x?token=[hidden]&a=1"),
        ("https://host/x?a=1&X-Amz-Signature=canary#b", "https://host/x?a=1&X-Amz-Signature=[hidden]#b"),
        ("https://host/x?sig=can%2Fary", "https://host/x?sig=[hidden]"),
        ("key hf_canarycanarycanary1 here", "key [hidden] here"),
        ("ghp_canarycanarycanary1", "[hidden]"),
        ("AKIACANARYCANARYCANA", "[hidden]"),
        ("Authorization: Bearer canary.canary", "Authorization: Bearer [hidden]"),
    ],
)
def test_what_has_the_form_of_a_secret_is_hidden(text, left):
    assert secrets.hidden(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/owner/name@main/train.jsonl",
        "https://example.com/a/b?page=3#part",
        "meta-llama/Meta-Llama-3-8B",
        "step 10/20  loss 1.234  tokens 1,234  tokens_per_second 99",
        "data.train: runs/tokens/key=1/file.jsonl row 3",
        "https://host:8080/path",
        "the eos_token is </s>, the pad_token_id 2",
    ],
)
def test_other_texts_are_left_alone(environment, text):
    assert secrets.hidden(text) == text


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in (*NAMED, "hub.token", "X-Amz-Signature", "userPassword", "basic_auth", "DB_PW")),
        *((name, False) for name in ("PATH", "TOKENIZERS_PARALLELISM", "HOME", "LANG", "KEYBOARD", "model.path")),
    ],
)
def test_names_tell_secrets(name, secret):
    assert secrets.is_name(name) is secret


def test_a_file_that_is_there_is_no_secret(tmp_path, monkeypatch):
    """A run is known again by the names of its files, whatever a variable holds meanwhile."""
    path = tmp_path / "canaries" / "rows.jsonl"
    path.parent.mkdir()
    path.touch()
    monkeypatch.setenv("DATABASE_PASS", "canaries")
    facts = {"digests": {str(path): "0"}, "note": "canaries", "number": 5}
    assert secrets.hidden_in(facts) == {"digests": {str(path): "0"}, "note": "[hidden]", "number": 5}


def test_files_are_written_without_secrets(environment, tmp_path):
    files.write_json(tmp_path / "run.json", {"a": [NAMED["HF_TOKEN"]], NAMED["MY_SECRET"]: {"b": "https://u:canary@h"}})
    assert "anary" not in (tmp_path / "run.json").read_text()
    assert "anary" not in dump(load_config(["data.train=https://user:canary@host/x.jsonl"]))


def test_what_only_holds_a_word_of_the_source_is_a_secret(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "progress")
    monkeypatch.setenv("OTHER_TOKEN", "progress-canary")
    monkeypatch.setenv("WANDB_API_KEY", NAMED["HF_TOKEN"])
    assert secrets.hidden("progress progress-canary") == "progress [hidden]"
    assert not any(secrets.is_public(value) for value in NAMED.values())


# ---- files that are made of words


def words_of(run: Path) -> set[str]:
    """The words that name things in a run's files, and those of the recipe that are its program's own."""
    texts = [name for path in run.rglob("*.json") for name in names_in(json.loads(path.read_text()))]
    texts += [name for path in run.rglob("*.safetensors") for name in load_file(path)]
    texts += ["q_proj", "linear", "cosine", "constant", *(path.name for path in run.rglob("*"))]
    words = {word for text in texts for word in re.findall(r"[A-Za-z_]\w*", text)}
    return {word for word in words if len(word) >= secrets.SHORTEST}


def names_in(value: object) -> Iterator[str]:
    """Keys of JSON; not those that are the names of somebody's files."""
    if isinstance(value, dict):
        yield from (key for key in value if not key.startswith("/"))
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from names_in(inner)


def plain(run: Path) -> dict[str, object]:
    """The files of a run that are read again, without what a clock or its folder's name says."""
    facts = {path.name: json.loads(path.read_text()) for path in sorted(run.rglob("*.json"))}
    facts["run.json"] = {key: facts["run.json"][key] for key in ("identity", "data", "step", "made", "versions")}
    recipe = {line for line in (run / "config.toml").read_text().splitlines() if not line.startswith("out = ")}
    return facts | {"recipe": recipe}


def test_words_of_the_files_are_no_secrets(start, monkeypatch):
    """Every one of them in a variable that is named like a token; the run is resumed, and ends in the same files."""
    keys = ("train.max_steps=2", "save.every_steps=1")
    run, _ = start("run", *keys)
    words = words_of(run)
    assert len(words) > 100 and {"progress", "optimizer", "identity", "adapter_model", "target_modules"} <= words
    for number, word in enumerate(sorted(words)):
        monkeypatch.setenv(f"MY_TOKEN_{number}", word)
    with monkeypatch.context() as patch:
        patch.setattr(peft_format, "save", None)
        with pytest.raises(TypeError):
            start("other", *keys)
    other, facts = start("other", *keys)
    assert facts["finished"] and plain(other) == plain(run)


def test_such_a_word_would_be_noticed(start, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "progress")
    monkeypatch.setattr(secrets, "is_public", lambda value: False)
    with pytest.raises(RunFailed, match="could not be written"):
        start("run", "train.max_steps=1")


def test_control_characters_do_not_reach_the_terminal():
    assert secrets.printable("a\x1b]0;owned\x07b\x00c\ud800") == "a?]0;owned?b?c\\ud800"
    assert secrets.printable("\r 50%|\x1b[1mbold\x1b[0m\n\ttab") == "\r 50%|\x1b[1mbold\x1b[0m\n\ttab"


# ---- whole runs

WATCHED = """
import runpy, sys, threading, time
bound = []
sys.addaudithook(lambda event, args: bound.append(event) if event == "socket.bind" else None)

def listening():
    import os
    own = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            pass
    for table in ("/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp"):
        for line in open(table).readlines()[1:]:
            columns = line.split()
            if columns[3] in ("0A", "07") and f"socket:[{columns[9]}]" in own:
                yield line

def watch():
    while True:
        bound.extend(listening())
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
{before}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    bound.extend(listening())
    print("BOUND" if bound else "nothing listens", file=sys.__stderr__)
"""


def run(arguments: list[str], folder: Path, before: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A script in a process of its own whose sockets are watched; arguments as on a command line."""
    return subprocess.run(
        [sys.executable, "-c", WATCHED.replace("{before}", before), *arguments],
        cwd=ROOT,
        env=os.environ | NAMED | {"HOME": str(folder)} | variables,
        capture_output=True,
        check=False,
        timeout=200,
    )


def everything(done: subprocess.CompletedProcess[bytes], folder: Path) -> bytes:
    """All that came of a run: what it said, and every byte of every file, names included."""
    found = [done.stdout, done.stderr]
    for path in folder.rglob("*"):
        found += [str(path).encode(), path.read_bytes() if path.is_file() else b""]
    return b"\n".join(found)


def test_a_run_tells_no_secrets_and_listens_nowhere(tmp_path):
    out = tmp_path / "run"
    recipe = (
        "scripts/train.py",
        f"out={out}",
        "train.max_steps=2",
        "eval.samples=1",
        "data.max_seq_len=64",
        "data.overlong=truncate",
        "data.checks=warn",  # so short, much is left out
    )
    done = run([*recipe, "train.batch_size=2", "eval.every_steps=0"], tmp_path)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert (out / "run.json").exists() and list((out / "tensorboard").iterdir())
    text = everything(done, tmp_path)
    assert b"anary" not in text and b"nothing listens" in done.stderr
    assert b"step 2/2" in text  # what should be there is


CRASH = """
import minitune.train
def train(cfg):
    token = __import__("os").environ["HF_TOKEN"]
    raise RuntimeError(f"could not reach https://user:can/ary@host/?token=canary with {token!r} {cfg.model.revision}")
minitune.train.train = train
"""


@pytest.mark.parametrize(
    ("arguments", "before", "code", "says"),
    [
        (["hub.token=canary-on-the-command-line"], "", 2, "hub.token: unknown key"),
        (["--token=canary-on-the-command-line"], "", 2, "[hidden]: no such option"),
        (["api_key='canary-on-the-command-line'", "lora.r=0"], "", 2, "api_key: unknown key"),
        (["data.train=https://user:can/ary@host/rows.jsonl"], "", 2, "https://[hidden]@host/rows.jsonl"),
        (["data.train=hf://datasets/a/b.jsonl?token=canary"], "", 2, "b.jsonl?token=[hidden]"),
        (["model.path=https://canary@host/model"], "", 2, "https://[hidden]@host/model"),
        ([], CRASH, 1, "could not reach https://[hidden]@host/?token=[hidden] with '[hidden]'"),
    ],
)
def test_what_goes_wrong_is_told_without_secrets(arguments, before, code, says, tmp_path):
    done = run(["scripts/train.py", f"out={tmp_path / 'run'}", *arguments], tmp_path, before)
    text = everything(done, tmp_path)
    assert done.returncode == code, done.stderr.decode()[-2000:]
    assert b"anary" not in text, done.stderr.decode()[-2000:]
    assert says in done.stderr.decode()


def test_the_watch_would_notice(tmp_path):
    """The negative control: a run that listens, and one that tells."""
    telling = (
        "import socket, os; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(os.environ['HF_TOKEN'])"
    )
    done = run(["scripts/train.py", "--help"], tmp_path, telling)
    assert b"BOUND" in done.stderr and b"anary" in done.stdout


# ---- rows that hold one ----------------------------------------------------------------------------------------------

LONG = "".join(random.Random(1).choices("abcdefghijkABCDEFG0123456789", k=88))  # cut wherever it is shown
HEAD = LONG[:10]


@pytest.fixture
def telling_rows(tmp_path: Path) -> list[Path]:
    """Some that are used, and some that are not, for what is said of them."""
    rows = [{"prompt": f"Key number {i} is {LONG} and what", "completion": f"{LONG} is it {i}"} for i in range(60)]
    rows += [{"prompt": "x", LONG: "q", "completion": [LONG]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + f'"{LONG}"\n' + f'{{"prompt": "{LONG}\n')
    turns = [[{"role": role, "content": "x"}, {"role": "assistant", "content": "y"}] for role in ("user", LONG)]
    chats = path.with_name("chats.jsonl")
    chats.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    return [path, chats]


@pytest.mark.parametrize("script", ["train", "data"])
def test_rows_that_hold_a_token_are_shown_without_it(telling_rows: list[Path], tmp_path: Path, script: str) -> None:
    out, page, cache = tmp_path / "run", tmp_path / "page.html", tmp_path / "cache"
    keys = [
        f"data.train={json.dumps([*map(str, telling_rows)])}",
        f"out={out}",
        f"data.cache={cache}",
        "data.bad_rows=skip",
        "data.checks=warn",
    ]
    keys += ["train.max_steps=1", "eval.samples=0"] if script == "train" else ["--html", str(page)]
    done = run([f"scripts/{script}.py", *keys], tmp_path, AZURE_STORAGE_KEY=LONG)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    written = [page] if script == "data" else [out / "left_out.jsonl", out / "config.toml", out / "run.json"]
    for text in (done.stdout, done.stderr, *(path.read_bytes() for path in written)):
        assert HEAD.encode() not in text and LONG[-10:].encode() not in text
    assert b"hidden" in written[0].read_bytes() and b"hidden" in done.stdout
    done = run([f"scripts/{script}.py", *keys, "train.resume=never"], tmp_path)  # the negative control
    assert HEAD.encode() in done.stdout and HEAD.encode() in written[0].read_bytes()


def test_a_text_is_cut_after_its_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", LONG)
    for most in range(10, 120):
        for last in (False, True):
            cut = secrets.shortened(f"before it {LONG} and after", most, last)
            assert len(cut) <= most and not any(LONG[i : i + 8] in cut for i in range(80))
    text = f"a {LONG} b https://user:canary@host/?sig=canary"
    black = secrets.blacked_out(text)
    assert len(black) == len(text) and LONG[:8] not in black and "canary" not in black and black.startswith("a \u2588")


@pytest.mark.parametrize(
    "arguments",
    [
        ['data.columns={token="canary-1", x=1}'],
        ["data.columns={x=1, password='canary-1'"],
        ['hub.tokens=["a-canary-2", "canary-1"]'],
        ["hub.tokens=['canary-1'"],
        ["--hf-token", "canary-1"],
        ["token: canary-1"],
        ["hub.token = canary-1"],
    ],
)
def test_settings_are_hidden_however_they_are_given(monkeypatch, arguments):
    monkeypatch.setattr(secrets, "noted", set())
    secrets.note_arguments(arguments)
    assert secrets.hidden("a canary-1 b") == "a [hidden] b"


@pytest.mark.parametrize("value", [["canary-1"], ("canary-1",), {"value": "canary-1"}, {"a": [{"b": "canary-1"}]}])
def test_settings_that_are_read_are_hidden(monkeypatch, value):
    monkeypatch.setattr(secrets, "noted", set())
    secrets.note("hub.tokens", value)
    secrets.note("data.columns", {"token": "canary-2", "canary-3": "answer"})
    assert secrets.hidden("canary-1 canary-2 canary-3") == "[hidden] [hidden] canary-3"


@pytest.mark.parametrize("arguments", [["--max-new-tokens", "1234567"], ["--prompt", "token: say something"], ["a: b"]])
def test_other_arguments_are_not(monkeypatch, arguments):
    monkeypatch.setattr(secrets, "noted", set())
    secrets.note_arguments(arguments)
    assert not secrets.noted


@pytest.mark.parametrize(
    "name", ["SECRETKEY", "AWS_SECRETKEY", "ACCESSKEY", "ENCRYPTIONKEY", "MY_JWT", "DB_PASSCODE", "HFTOKEN"]
)
def test_more_names_tell_secrets(name):
    assert secrets.is_name(name) and not secrets.is_name(f"{name}BOARD")


def test_texts_are_written_without_secrets_and_what_a_model_needs_exactly(environment, tmp_path):
    text = f"a {NAMED['HF_TOKEN']} <{NAMED['DB_PASSWORD']}> &lt;"
    files.write_text(tmp_path / "page.html", text)
    files.write_lines(tmp_path / "rows.jsonl", ({"n": n, "reason": text} for n in range(2500)))
    assert "anary" not in (tmp_path / "page.html").read_text() + (tmp_path / "rows.jsonl").read_text()
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == list(range(2500))
    files.write_bytes(tmp_path / "tokenizer.json", text.encode())
    assert (tmp_path / "tokenizer.json").read_text() == text
