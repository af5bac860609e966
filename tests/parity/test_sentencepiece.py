"""A bare sentencepiece file gives sentencepiece's own ids, and those of transformers; where the two differ is said."""

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from test_tokenizer import LLAMA2, TEXTS, both, check_equal, llama2_folder, train_sentencepiece, write

from minitune import sentencepiece_model
from minitune.tokenizer import load_tokenizer

MODELS: dict[str, dict[str, Any]] = {  # options of sentencepiece's trainer
    "trims": {"normalization_rule_name": "identity"},
    "keeps spaces": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "no prefix": {"normalization_rule_name": "identity", "add_dummy_prefix": False},
    "neither": {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "unknown": {"normalization_rule_name": "identity", "byte_fallback": False, "character_coverage": 0.98},
    "none whole": {"normalization_rule_name": "identity", "user_defined_symbols": []},
}
SPECIAL = ["<s>", "</s>", "<unk>", "<ctl>", "<pad>"]  # ids in a text here and in transformers, text in sentencepiece
SYMBOLS = [" ", "  ", "\n", "\t", "▁", "a", "b", "aa", "=", "<", ">", "é", "中", "the", "'", "\u3000", "<tool>"]


def texts() -> list[str]:
    draw = random.Random(0)
    drawn = ["".join(draw.choices(SYMBOLS, k=draw.randrange(15))) for _ in range(2000)]
    return [text for text in [*TEXTS, *drawn] if not any(token in text for token in SPECIAL)]


def model_folder(folder: Path, options: dict[str, Any], config: dict[str, Any]) -> Path:
    train_sentencepiece(folder, model_type="bpe", **options)
    write(folder, "config.json", {"model_type": "llama"})
    write(folder, "tokenizer_config.json", config)
    return folder


def differences(folder: Path) -> list[str]:
    """The texts whose ids are not sentencepiece's."""
    ours = load_tokenizer(folder)
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [text for text in texts() if ours.encode(text) != own.encode(text)]


def test_llama2_gives_sentencepieces_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = llama2_folder(tmp_path, None)
    assert differences(folder) == []
    real = sentencepiece_model.normalizers
    monkeypatch.setattr(sentencepiece_model, "normalizers", lambda spec, legacy: real(spec, False))
    assert all(text[0] in " ▁" for text in differences(folder)) and differences(folder)  # the check can fail


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_sentencepieces_ids(options: dict[str, Any], tmp_path: Path) -> None:
    folder = model_folder(tmp_path, options, {})
    check_equal(*both(folder), texts())
    found = differences(folder)
    trims = options.get("remove_extra_whitespaces", True)
    written = {text for text in found if trims and text.rstrip(" ").endswith("▁")}  # trimmed there as if a space
    marks = {text for text in found if "\u0323" in text and options["normalization_rule_name"] == "nmt_nfkc"}
    assert set(found) == written | marks
    assert len(found) < len(texts()) / 5


def test_the_score_ranks_the_merges_not_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary whose pieces were shuffled after training."""
    folder = model_folder(tmp_path, MODELS["keeps spaces"], {})
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    normal = [id for id, piece in enumerate(model.pieces) if piece.type == sentencepiece_model.NORMAL]
    pieces = [(model.pieces[id].piece, model.pieces[id].score) for id in normal]
    random.Random(1).shuffle(pieces)
    for id, (text, score) in zip(normal, pieces, strict=True):
        model.pieces[id].piece, model.pieces[id].score = text, score
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    check_equal(*both(folder), texts())
    assert differences(folder) == []
    by_id = lambda model, texts: sentencepiece_model.bare_state(model)["model"]["merges"]  # noqa: E731
    monkeypatch.setattr(sentencepiece_model, "ranked_merges", by_id)
    assert len(differences(folder)) > 100


@pytest.mark.parametrize("legacy", [{}, {"legacy": True}, {"legacy": False}], ids=["unsaid", "legacy", "not legacy"])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
def test_pieces_with_new_names(legacy: dict[str, bool], prefix: bool, tmp_path: Path) -> None:
    """Placeholders that a folder gives names of its own, a swap, a name that is taken, and tokens past the end."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    decoder = {
        "4": {"content": "<|call|>", "normalized": True, "special": False, **flags},  # <ctl>, or <tool>
        "300": {"content": "<|new|>", "normalized": True, "special": False, **flags},
        "301": {"content": "the", "normalized": False, "special": False, **flags},
        "700": {"content": "<|eot|>", "normalized": True, "special": True, **flags},
    }
    config = legacy | {"added_tokens_decoder": decoder, "additional_special_tokens": ["<|eot|>", "<|more|>"]}
    folder = model_folder(tmp_path, MODELS["trims" if prefix else "no prefix"], config)
    ours, reference = both(folder)
    more = ["a<|call|> b", "<|new|>x <|new|>", "the <|eot|> the", "▁<|more|>▁", " a <tool> b<ctl> c"]
    check_equal(ours, reference, [*TEXTS, *more])
    assert ours.encode("<|new|>")[-1] == 300


def test_a_part_of_a_text_keeps_its_ends(tmp_path: Path) -> None:
    """What a whole text loses, a space before or after it, is a word's end within one."""
    for options in (MODELS["trims"], MODELS["keeps spaces"]):
        (tmp_path / str(len(options))).mkdir()
        ours = load_tokenizer(model_folder(tmp_path / str(len(options)), options, {}))
        ids = ours.encode("one")
        for part in (" two ", "three", " four"):
            ids += ours.encode_continuation(part)
        assert ours.decode(ids) == "one two three four"
    assert ours.decode(ours.encode("one") + ours.encode(" two")) != "one two"


def test_the_llama_class_is_another_recipe(tmp_path: Path) -> None:
    """Why tokenizer.py keeps both: transformers serves this class with other ids than sentencepiece's own."""
    ours, reference = both(llama2_folder(tmp_path, {"tokenizer_class": "LlamaTokenizer"}))
    own = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2))
    assert ours.encode("two words") == own.encode("two words")
    assert ours.encode(" two words") == reference.encode(" two words", add_special_tokens=False)
    assert ours.encode(" two words") != own.encode(" two words")
    assert isinstance(reference, transformers.LlamaTokenizer)
