"""A sentencepiece BPE model (`tokenizer.model`) in the words of `tokenizer.json`, for the `tokenizers` library to run.

Two ways, as in transformers (5.24 and later), since a model must be served with the ids that it was trained on:

- `own_state`, where the folder names no class that has a recipe of its own: what the file itself says. The ids are
  those of sentencepiece's own `encode`, but for special tokens written in a text, which become their ids here and are
  plain text there, and for what a test lists (tests/parity/test_sentencepiece.py): a "▁" written at the end of a
  text, where sentencepiece takes it for one of the spaces that it trims, and combining marks in a row, which the
  `tokenizers` library normalises a character at a time.
- `bare_state`, for the class LlamaTokenizer: the pieces and their merges alone; tokenizer.py gives it the rest.
"""

import base64
import re
from pathlib import Path
from typing import Any

from minitune import tokenizer_bounds as bounds
from minitune.errors import UserError
from minitune.foreign import read_bytes

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # sentencepiece's numbers for the kinds of a piece
SPACE = "▁"  # how pieces write a space


def read(path: Path) -> Any:
    """The model as sentencepiece's ModelProto. Raises UserError where the file holds none, or one that is not BPE."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    try:
        model = ModelProto.FromString(read_bytes(path, bounds.SENTENCEPIECE))
    except DecodeError:
        model = ModelProto()
    if not model.pieces:
        raise UserError(f"{path} is not a sentencepiece model (tiktoken's file of that name is not supported)")
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise UserError(f"{path} is not a BPE model, the one kind of sentencepiece model that is supported")
    if len(model.pieces) > bounds.TOKENS or sum(len(piece.piece) for piece in model.pieces) > bounds.SPLITS:
        raise UserError(f"{path} holds more or longer pieces than any vocabulary has")
    return model


def named_pieces(model: Any) -> dict[str, str]:
    """bos_token, eos_token and unk_token, those that the model has."""
    spec = model.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    return {name: getattr(spec, name.replace("token", "piece")) for name, id in ids.items() if id >= 0}


def symbols(model: Any, user_defined: bool) -> list[dict[str, Any]]:
    """The control pieces, which are special tokens, and maybe the user-defined, which only stand for themselves."""
    kinds = {CONTROL: True} | ({USER_DEFINED: False} if user_defined else {})
    return [
        {"content": piece.piece, "normalized": False, "special": kinds[piece.type]}
        for piece in model.pieces
        if piece.type in kinds
    ]


def bare_state(model: Any) -> dict[str, Any]:
    """Every piece, and every way to make one of two others: the earlier piece first, then the shorter left part."""
    vocab = {piece.piece: id for id, piece in enumerate(model.pieces)}
    merges = [cut for piece in vocab for cut in cuts(piece) if cut[0] in vocab and cut[1] in vocab]
    return {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


def own_state(model: Any, renamed: dict[int, str], legacy: bool) -> dict[str, Any]:
    """The engine that does what the model's own specification says.

    `renamed`: texts that the folder gives ids that are pieces already (a placeholder's new name). `legacy`: a space
    goes before the text after each special token, too, and not only at the beginning.
    """
    texts = renamed_pieces(model, renamed)
    whole = [text for text, piece in zip(texts, model.pieces, strict=True) if piece.type == USER_DEFINED]
    bytes_too = model.trainer_spec.byte_fallback
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers(model.normalizer_spec, legacy)},
        "pre_tokenizer": pre_tokenizer(model.normalizer_spec, whole, legacy),
        "decoder": {"type": "Sequence", "decoders": decoders(model.normalizer_spec, bytes_too)},
        "model": {
            "type": "BPE",
            "vocab": {text: id for id, text in enumerate(texts)},
            "merges": ranked_merges(model, texts),
            "unk_token": renamed.get(model.trainer_spec.unk_id, model.trainer_spec.unk_piece),
            "fuse_unk": True,
            "byte_fallback": bytes_too,
            "ignore_merges": bool(whole),  # a chunk that is a piece is that piece: no merge makes a user-defined one
        },
    }


def renamed_pieces(model: Any, renamed: dict[int, str]) -> list[str]:
    """The pieces' texts by id. No piece takes the name of one that keeps its own; two may swap theirs."""
    kept = {piece.piece for id, piece in enumerate(model.pieces) if id not in renamed}
    names = {id: text for id, text in renamed.items() if text not in kept}
    return [names.get(id, piece.piece) for id, piece in enumerate(model.pieces)]


def ranked_merges(model: Any, texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of normal pieces that make a normal piece, in sentencepiece's order: the best score, then the lower id."""
    rank = {texts[id]: (-p.score, id) for id, p in enumerate(model.pieces) if p.type == NORMAL}
    pairs = [(rank[text], cut) for text in rank for cut in cuts(text) if cut[0] in rank and cut[1] in rank]
    return [cut for _, cut in sorted(pairs)]


def cuts(text: str) -> list[tuple[str, str]]:
    return [(text[:n], text[n:]) for n in range(1, len(text))]


def normalizers(spec: Any, legacy: bool) -> list[dict[str, Any]]:
    """In sentencepiece's order: characters are mapped, spaces trimmed and made one, then written as ▁."""
    steps = []
    if spec.precompiled_charsmap:
        encoded = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if spec.remove_extra_whitespaces:  # spaces alone; newlines and tabs stay
        steps += [replace({"Regex": r"\A +| +\z"}, ""), replace({"Regex": " {2,}"}, " ")]
    if spec.escape_whitespaces:
        steps.append(replace({"String": " "}, SPACE))
    if spec.add_dummy_prefix and legacy:  # Metaspace puts no ▁ before a text that has one; sentencepiece does
        steps.append(replace({"Regex": rf"\A{SPACE}"}, 2 * SPACE))
    return steps


def pre_tokenizer(spec: Any, whole: list[str], legacy: bool) -> dict[str, Any] | None:
    """The space before a text, and the pieces that are never merged with their neighbours, the longest first."""
    steps: list[dict[str, Any]] = []
    if spec.add_dummy_prefix:
        scheme = "always" if legacy else "first"
        steps.append({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False})
    if whole:
        pattern = "|".join(re.escape(text) for text in sorted(whole, key=len, reverse=True))
        steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    return {"type": "Sequence", "pretokenizers": steps} if steps else None


def decoders(spec: Any, bytes_too: bool) -> list[dict[str, Any]]:
    steps = [replace({"String": SPACE}, " ")]
    if bytes_too:
        steps.append({"type": "ByteFallback"})
    if bytes_too or spec.add_dummy_prefix:
        steps.append({"type": "Fuse"})
    if spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
