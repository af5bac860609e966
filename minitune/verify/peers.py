"""Adapters against PEFT's own on transformers' own model: outputs, gradients, ten AdamW steps, merged weights.

PEFT makes its adapter from the folder that `peft_format` writes, so nothing here knows one variant from another. What
a variant changes about the optimizer (LoRA+'s two rates, LoRA-FA's correction) is left out on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from minitune import adapters, peft_format
from minitune.config import Config, ModelConfig
from minitune.model import Llama
from minitune.verify import small
from minitune.verify.table import EXACT, Check, NotMeant, apart, same, worst

PACKAGES = ("transformers", "peft")


def reference(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
    """transformers' model of a folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()


def peft_reads(folder: Path) -> str | None:
    """Why PEFT does not take an adapter_config.json for one of its kinds, or None."""
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # each kind of file that it does not know raises another
        return f"{type(error).__name__}: {error}"
    known = set(config.to_dict())
    said = json.loads((folder / peft_format.CONFIG).read_text())
    return next((f"it does not know {key}" for key, value in said.items() if value and key not in known), None)


class Pair:
    """The same live adapters here and in PEFT."""

    def __init__(self, cfg: Config, folder: Path, device: torch.device) -> None:
        self.cfg, self.folder, self.device = cfg, folder, device

    @cached_property
    def path(self) -> Path:
        if not self.folder.exists():
            lora, base = self.cfg.lora, ModelConfig(path=self.cfg.model.path)
            peft_format.save(self.folder, small.built(self.cfg, self.device), lora, base)
        return self.folder

    def models(self) -> tuple[Llama, nn.Module]:
        return small.built(self.cfg, self.device), self.theirs()

    def trains_as_it_is_saved(self) -> bool:
        """Whether what trains is what the folder holds; else it is handed over as another adapter, and PEFT has nothing
        to compare its gradients with."""
        ours, saved = small.built(self.cfg, self.device), load_file(self.path / peft_format.WEIGHTS)
        named = peft_format.state(ours)
        held = {t.data_ptr() for name, t in named.items() if name in saved and same(saved[name], t.cpu())}
        return all(p.data_ptr() in held for p in ours.parameters() if p.requires_grad)

    def theirs(self) -> nn.Module:
        import peft

        base = reference(Path(self.cfg.model.path), device=self.device)
        return peft.PeftModel.from_pretrained(base, str(self.path), is_trainable=True)

    def trained(self) -> tuple[Llama, nn.Module, dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Both models, and what trains in ours with its twin in PEFT's, under the names in the file."""
        import peft

        ours, theirs = self.models()
        places = {p.data_ptr(): p for p in ours.parameters() if p.requires_grad}
        twins = {p.data_ptr(): p for p in theirs.parameters()}
        said = {name: places.get(t.data_ptr()) for name, t in peft_format.state(ours).items()}
        said = {name: p for name, p in said.items() if p is not None}
        saved = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
        found = {name: twins[t.data_ptr()] for name, t in saved.items() if name in said}
        for parameter in theirs.parameters():
            parameter.requires_grad_(False)
        for parameter in found.values():
            parameter.requires_grad_(True)
        return ours.train(), theirs.train(), said, found

    def outputs(self) -> float:
        ours, theirs = self.models()
        tokens, _ = batch(0, self.device)
        with torch.no_grad():
            bare = reference(Path(self.cfg.model.path), device=self.device)(input_ids=tokens).logits
            expected = theirs.eval()(input_ids=tokens).logits
            assert apart(expected, bare) > 1e-3, "the adapter does not show in the logits"
            return apart(ours.eval()(tokens), expected)

    def gradients(self) -> tuple[float, str]:
        ours, theirs, said, found = self.trained()
        losses(ours, theirs, 0, self.device)
        return worst({name: p.grad for name, p in said.items()}, {name: p.grad for name, p in found.items()})

    def ten_steps(self) -> tuple[float, str]:
        """With an eps far above rounding: near zero, the first steps take each gradient's sign, and that of one which
        is all rounding is chance."""
        ours, theirs, said, found = self.trained()
        before = {name: p.detach().clone() for name, p in said.items()}
        options = {"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-3}
        optimizers = [torch.optim.AdamW(list(p.values()), **options) for p in (said, found)]
        for step in range(10):
            losses(ours, theirs, step, self.device)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert all(apart(p, before[name]) > 1e-3 for name, p in said.items()), "ten steps moved nothing"
        return worst(said, found)

    def merged(self) -> tuple[float, str]:
        """Of all adapted weights, relative to what is added to each."""
        ours, theirs = self.models()
        whole = theirs.merge_and_unload().state_dict()
        found = (0.0, "")
        for name, adapter in adapters.adapters(ours).items():
            weight = adapter.base.weight.detach()
            merged = adapter.merged_weight(weight.double())
            found = max(found, (apart(merged, whole[f"{name}.weight"], merged - weight), name))
        return found


def checks(variant: str, pair: Pair) -> Iterator[Check]:
    yield Check(f"{variant}: outputs", "PEFT", EXACT, pair.outputs, PACKAGES)
    if pair.trains_as_it_is_saved():
        yield Check(f"{variant}: every gradient", "PEFT", EXACT, pair.gradients, PACKAGES)
        yield Check(f"{variant}: ten AdamW steps", "PEFT", EXACT, pair.ten_steps, PACKAGES)
    yield Check(f"{variant}: merged weights, of the update", "PEFT", EXACT, pair.merged, PACKAGES)


def loads_or_refuses(cfg: Config, folder: Path, device: torch.device) -> float | tuple[float, str]:
    """A folder that PEFT loads as something else would be used wrongly without a word."""
    pair = Pair(cfg, folder / "adapter", device)
    why = peft_reads(pair.path)
    if why and not loads(pair):
        raise NotMeant(f"refused: {why.splitlines()[0][:90]}")
    tokens, _ = batch(0, device)
    with torch.no_grad():
        bare = reference(Path(cfg.model.path), device=device)(input_ids=tokens).logits
        ours, theirs = small.built(cfg, device).eval()(tokens), pair.theirs().eval()(input_ids=tokens).logits
    return apart(ours, theirs, ours - bare), (
        'PEFT loads it as another adapter without a word; let PEFT_CONFIG say a "peft_type" that PEFT does not know'
    )


def loads(pair: Pair) -> bool:
    """Whether PEFT loads the folder all the same, as it does where it merely does not know a key."""
    try:
        return pair.theirs() is not None
    except Exception:
        return False


# ---- what both are given -------------------------------------------------------------------------------------------


def batch(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (3, 17) and labels, the token after each; rows hold unequal numbers of loss tokens."""
    draw = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(3, small.SHAPE["vocab_size"], (3, 17), generator=draw)
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    for row, prompt in enumerate((2, 7, 13)):
        labels[row, : prompt + step % 3] = -100
    return tokens.to(device), labels.to(device)


def losses(ours: Llama, theirs: nn.Module, step: int, device: torch.device) -> None:
    """The mean loss of a batch in both, and its gradients."""
    tokens, labels = batch(step, device)
    (ours(tokens, labels=labels) / (labels != -100).sum()).backward()
    shifted = F.pad(labels[:, :-1], (1, 0), value=-100)  # transformers shifts by itself
    theirs(input_ids=tokens, labels=shifted).loss.backward()
