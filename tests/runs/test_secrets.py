"""Tokens, keys and passwords are in nothing that a run prints or writes, however they came to it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from minitune import files, secrets
from minitune.config import dump, load_config

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
    path = tmp_path / "training" / "rows.jsonl"
    path.parent.mkdir()
    path.touch()
    monkeypatch.setenv("DATABASE_PASS", "training")
    facts = {"digests": {str(path): "0"}, "note": "training", "number": 5}
    assert secrets.hidden_in(facts) == {"digests": {str(path): "0"}, "note": "[hidden]", "number": 5}


def test_files_are_written_without_secrets(environment, tmp_path):
    files.write_json(tmp_path / "run.json", {"a": [NAMED["HF_TOKEN"]], NAMED["MY_SECRET"]: {"b": "https://u:canary@h"}})
    assert "anary" not in (tmp_path / "run.json").read_text()
    assert "anary" not in dump(load_config(["data.train=https://user:canary@host/x.jsonl"]))


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
