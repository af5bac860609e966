"""The built-in example: its text, rows and tokenizer made again, and what the package ships compared."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
TINY = ROOT / "minitune" / "tiny"
JSON_OR_PROMPT = re.compile(r'\{ *"|JSON|### ?(Instruction|Input|Response)')


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return {name: importlib.import_module(name) for name in ("tiny_orders", "tiny_text", "make_tiny")}
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()]


def unsupported(row: dict[str, str]) -> list[str]:
    """The values of a row's record that its sentence does not hold as whole words."""
    values = map(str, json.loads(row["output"]).values())
    return [value for value in values if not re.search(rf"\b{value}\b", row["input"])]


def test_shipped_rows_are_those_the_script_makes(scripts, rows):
    make_tiny = scripts["make_tiny"]
    assert rows == scripts["tiny_orders"].skill_rows(make_tiny.SKILL_ROWS, make_tiny.SEED)
    assert rows != scripts["tiny_orders"].skill_rows(make_tiny.SKILL_ROWS, make_tiny.SEED + 1)


def test_every_record_is_in_its_sentence_and_no_two_are_equal(rows):
    assert [row for row in rows if unsupported(row)] == []
    assert len({row["input"] for row in rows}) == len({row["output"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["instruction", "input", "output"]
        assert list(json.loads(row["output"])) == ["name", "item", "color", "count", "city", "day"]
    assert unsupported(rows[0] | {"output": rows[1]["output"]}), "the check must see a swapped answer"


def test_corpus_is_reproducible_and_lacks_the_skill(scripts, rows):
    documents = list(scripts["tiny_text"].documents(3000, seed=7))
    assert documents == list(scripts["tiny_text"].documents(3000, seed=7))
    assert len(set(documents)) > 2950
    assert set(documents).isdisjoint(scripts["tiny_text"].documents(3000, seed=8))
    assert [text for text in documents if JSON_OR_PROMPT.search(text)] == []
    assert all(JSON_OR_PROMPT.search(row["output"]) for row in rows), "the check must see a record"
    assert set('{}[]()"#:,.|;=<>+-') <= set("".join(documents)), "every sign is trained in some other use"


def test_tokenizer_is_as_transformers_reads_it(scripts, tmp_path):
    scripts["make_tiny"].write_tokenizer(tmp_path, scripts["tiny_text"].documents(3000, seed=7))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    for text in ["Please send 305 red lamps.", '{"name": "Zoë"}\n', "  中文 🙂\t\x00 end "]:
        ids = theirs(text).input_ids
        assert ids[0] == 0 and 0 not in ids[1:]
        assert theirs.decode(ids[1:]) == text
    assert [theirs.decode(i) for i in theirs("305").input_ids[1:]] == ["3", "0", "5"]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "<s><|user|>\nHi</s>\n<|assistant|>\nYes</s>\n"
    asked = theirs.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<s><|user|>\nHi</s>\n<|assistant|>\n"


def test_random_model_has_the_names_and_shapes_of_transformers(scripts, tmp_path):
    scripts["make_tiny"].write_random_model(tmp_path, seed=3)
    theirs = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path))
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}  # a tied head counts once
    assert scripts["make_tiny"].weight_shapes() == shapes
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(shapes)
        assert file.get_tensor("model.layers.0.mlp.up_proj.weight").std() == pytest.approx(0.02, rel=0.02)
        assert torch.equal(file.get_tensor("model.norm.weight"), torch.ones(shapes["model.norm.weight"]))


@pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="make_tiny.py has not been run")
def test_shipped_model_is_what_the_script_describes(scripts):
    with safe_open(TINY / "model.safetensors", "pt") as file:
        shipped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(w.shape) for name, w in shipped.items()} == scripts["make_tiny"].weight_shapes()
    assert {w.dtype for w in shipped.values()} == {torch.bfloat16}
    assert json.loads((TINY / "config.json").read_text()) == scripts["make_tiny"].CONFIG
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 12e6
