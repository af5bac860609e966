"""Checkpoints that hold nonsense under a manifest that is right: set aside or refused, without traceback or hang."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import torch
from forked import Lost, Plant
from outcome import must_equal, sha256
from rows import Case, Row, must, must_refuse
from safetensors.torch import load_file, save_file
from torch import Tensor
from world import METHODS

NAN, INF = float("nan"), float("inf")
SECONDS = 30.0  # that a run may take to notice
Tensors = dict[str, Tensor]
Edit = Callable[[Path], None]


def tensors_of(file: str, change: Callable[[Tensors], Any]) -> Edit:
    """`change` edits the tensors of a file in place, or returns others."""

    def edit(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / file)
        changed = change(tensors)
        save_file(tensors if changed is None else changed, checkpoint / file, {"format": "pt"})

    return edit


trained = partial(tensors_of, "trained.safetensors")
moments = partial(tensors_of, "optimizer.safetensors")


def first(tensors: Tensors, part: str = "") -> str:
    return min(name for name in tensors if part in name and tensors[name].numel() > 1)


def one_number(value: float, part: str = "") -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[first(tensors, part)].view(-1)[3] = value

    return change


def all_as(function: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: function(tensor).contiguous() for name, tensor in tensors.items()}


def without_one(tensors: Tensors) -> None:
    del tensors[first(tensors)]


def one_more(tensors: Tensors) -> None:
    tensors["model.layers.7.self_attn.q_proj.lora_A"] = torch.ones(4, 64)


def one_of_shape(*shape: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[first(tensors)] = torch.zeros(*shape)

    return change


def state_where(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """`change` edits state.json in place, or returns what is to stand in it: JSON, or text."""

    def edit(checkpoint: Path) -> None:
        state = json.loads((checkpoint / "state.json").read_text())
        changed = change(state)
        value = state if changed is None else changed
        (checkpoint / "state.json").write_text(value if isinstance(value, str) else json.dumps(value))

    return edit


def put(*keys: str, value: Any) -> Edit:
    def change(state: dict[str, Any]) -> None:
        *way, last = keys
        for key in way:
            state = state[key]
        state[last] = value

    return state_where(change)


def big_number(state: dict[str, Any]) -> str:
    return json.dumps(state | {"step": -1}).replace('"step": -1', '"step": 1' + "0" * 400)


def content(file: str, data: bytes) -> Edit:
    return lambda checkpoint: (checkpoint / file).write_bytes(data) and None


def replaced(file: str, make: Callable[[Path], Any]) -> Edit:
    """Another kind of thing under the name of a file."""

    def edit(checkpoint: Path) -> None:
        (checkpoint / file).rename(checkpoint.parent.parent.parent / f"moved-{file}")
        make(checkpoint / file)

    return edit


def link_out(path: Path) -> None:
    path.symlink_to(path.parent.parent.parent.parent / f"moved-{path.name}")


def manifest_where(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        changed = change(manifest)
        value = manifest if changed is None else changed
        (checkpoint / "manifest.json").write_text(value if isinstance(value, str) else json.dumps(value))

    return edit


def many_digits(manifest: dict[str, Any]) -> str:
    manifest["state.json"]["bytes"] = -1
    return json.dumps(manifest).replace("-1", "9" * 400)


def bad_is_a_file(checkpoint: Path) -> None:
    """What a damaged checkpoint is set aside as is taken already."""
    (checkpoint / "state.json").write_text("{}")
    checkpoint.with_name(f"{checkpoint.name}.bad").write_text("somebody's notes")


def linked_folder(checkpoint: Path) -> None:
    elsewhere = checkpoint.parent.parent.parent / "elsewhere"
    checkpoint.rename(elsewhere)
    checkpoint.symlink_to(elsewhere)


def is_a_file(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.parent.parent.parent / "elsewhere")
    checkpoint.write_text("no folder")


def of_other_step(checkpoint: Path) -> None:
    """A checkpoint under the number of another."""
    checkpoint.rename(checkpoint.with_name("step-000011"))


UNSEALED: dict[str, Edit] = {  # the manifest is made anew after these
    "a weight is NaN": trained(one_number(NAN)),
    "a weight is infinite": trained(one_number(-INF)),
    "weights of another shape": trained(one_of_shape(3, 5)),
    "weights transposed": trained(all_as(lambda t: t.T if t.ndim == 2 else t.view(1, -1))),
    "weights of another dtype": trained(all_as(Tensor.half)),
    "weights of whole numbers": trained(all_as(Tensor.long)),
    "a weight is missing": trained(without_one),
    "a weight too many": trained(one_more),
    "no weights": trained(lambda tensors: {}),
    "a weight of no size": trained(one_of_shape(0)),
    "weights of other names": trained(lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()}),
    "weights that are no safetensors": content("trained.safetensors", b"\x80\x04K\x01." * 99),
    "a header of 2^60 bytes": content("trained.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
    "an empty weights file": content("trained.safetensors", b""),
    "a moment is NaN": moments(one_number(NAN, "exp_avg")),
    "a moment is infinite": moments(one_number(INF, "exp_avg")),
    "a second moment below zero": moments(one_number(-1.0, "exp_avg_sq")),
    "no moments": moments(lambda tensors: {}),
    "a moment is missing": moments(without_one),
    "moments of another shape": moments(one_of_shape(3, 5)),
    "moments of another dtype": moments(all_as(Tensor.half)),
    "moments of what does not train": moments(one_more),
    "moments of another number of steps": moments(all_as(lambda t: t + 100 if t.ndim == 0 else t)),
    "step 10^400": state_where(big_number),
    "step -1": put("step", value=-1),
    "a step that is text": put("step", value="9"),
    "a step past the end": put("step", value=10**6),
    "identity a list": put("identity", value=[1, 2]),
    "identity nothing": put("identity", value=None),
    "state a list": state_where(lambda state: [state]),
    "state nested 100,000 deep": state_where(lambda state: "[" * 10**5),
    "state that is no JSON": state_where(lambda state: "{"),
    "no progress": state_where(lambda state: {key: value for key, value in state.items() if key != "progress"}),
    "progress with another key": put("progress", "colour", value="blue"),
    "progress of 10^30 tokens": put("progress", "tokens", value=10**30),
    "a best loss of NaN": put("progress", "best_loss", value=NAN),
    "a best step past the end": put("progress", "best_step", value=10**9),
    "no place in the data": put("progress", "stream", value={}),
    "a place in the data of text": put("progress", "stream", value={"epoch": "x", "row": None}),
    "optimizer numbers of text": put("optimizer", value={"a": "b"}),
    "optimizer numbers a list": put("optimizer", value=[1]),
    "a step of another folder": of_other_step,
}
SEALED: dict[str, Edit] = {  # these change the manifest, or what kind of thing a file is
    "state.json a pipe": replaced("state.json", os.mkfifo),
    "manifest.json a pipe": replaced("manifest.json", os.mkfifo),
    "weights a pipe": replaced("trained.safetensors", os.mkfifo),
    "weights a folder": replaced("trained.safetensors", Path.mkdir),
    "weights a link out of the run": replaced("trained.safetensors", link_out),
    "state.json a link out of the run": replaced("state.json", link_out),
    "weights a link to /dev/zero": replaced("trained.safetensors", lambda path: path.symlink_to("/dev/zero")),
    "a manifest that is a list": manifest_where(list),
    "a manifest of numbers of 400 digits": manifest_where(many_digits),
    "a manifest of another file": manifest_where(lambda manifest: manifest.update({"../../config.toml": {"bytes": 1}})),
    "a manifest of fewer files": manifest_where(lambda manifest: {"state.json": manifest["state.json"]}),
    "a manifest nested 100,000 deep": manifest_where(lambda manifest: '{"a":' * 10**5),
    "a folder that is a file": is_a_file,
    "a folder that is a link": linked_folder,
    "a .bad that is a file": bad_is_a_file,
}
KINDS = [*UNSEALED, *SEALED]


def seal(checkpoint: Path) -> None:
    """Write the manifest that fits what is there."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.name != "manifest.json"]
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def hold_nonsense(case: Case, kinds: list[str] = KINDS, mutant: tuple[Plant, ...] = ()) -> None:
    kind = kinds[case.index % len(kinds)]
    method = METHODS[case.index % len(METHODS)]
    *_, newest = case.go_on_from(method)
    (UNSEALED | SEALED)[kind](newest)
    if kind in UNSEALED:
        [nonsense] = [path for path in (newest, newest.with_name("step-000011")) if path.exists()]
        seal(nonsense)
    try:
        ended = case.world.start(case.run, method, *mutant).wait(SECONDS)
    except Lost as lost:
        raise Lost(f"{kind}: {lost}") from None
    must("Traceback" not in ended.err + ended.out, f"{kind}: {ended.said()}")
    if ended.code:
        must_refuse(ended)
        must(newest.name in ended.err, f"{kind}: refused, not named: {ended.said()}")
        return
    named = newest.name if kind != "a step of another folder" else "step-000011"
    must(f"{named} is damaged" in ended.out, f"{kind}: not noticed")
    try:
        must_equal(case.run, case.world.straight[method])
    except Lost as lost:
        raise Lost(f"{kind}: {lost}") from None


ROWS = [
    Row(
        "nonsense under a right manifest",
        hold_nonsense,
        partial(hold_nonsense, kinds=["a weight is NaN", "a moment is NaN"], mutant=(mutants.blind,)),
        full=len(KINDS),
        pr=14,
        controls=2,
    )
]
