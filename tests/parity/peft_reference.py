"""Small random Llamas in transformers and PEFT, and the same ones here: what the parity tests compare with."""

import json
import shutil
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

from minitune import adapters, files, peft_format, pretrained, runs
from minitune.config import LINEARS, LoRAConfig, ModelConfig, dump, load_config
from minitune.model import Llama

R, ALPHA = 5, 12  # alpha / r is neither 1 nor 2
VOCAB = 131
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def base_folder(
    folder: Path,
    *,
    tied: bool = False,
    wide: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **changes: object,
) -> Path:
    """A model folder that transformers wrote: two layers, grouped queries, odd sizes (`wide`: multiples of 64)."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 16}
    odd = {"hidden_size": 54, "intermediate_size": 93, "num_attention_heads": 6, "head_dim": 10}
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 160,
            "initializer_range": 0.15,
            "tie_word_embeddings": tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            **(shape if wide else odd),
            **changes,
        }
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # ones would hide a norm that is applied in the wrong place
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER:
        shutil.copyfile(pretrained.TINY / name, folder / name)
    return folder


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.LlamaForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def lora_config(*targets: str, dropout: float = 0.0) -> LoRAConfig:
    return LoRAConfig(r=R, alpha=ALPHA, dropout=dropout, target_modules=targets or LINEARS)


def adapted(folder: Path, cfg: LoRAConfig, seed: int = 1) -> Llama:
    """The model of a folder with adapters that all do something: lora_B is never zero."""
    model = pretrained.load(folder)
    adapters.attach(model, cfg)
    adapters.reset(model, seed)
    return liven(model)


@torch.no_grad()
def liven(model: nn.Module, seed: int = 2) -> nn.Module:
    """Give every lora_B random values."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
            assert (parameter != 0).all()
    return model


def peft_model(folder: Path, cfg: LoRAConfig, **changes: object) -> peft.PeftModel:
    """PEFT's own adapters of the same kind on transformers' own model."""
    config = peft.LoraConfig(
        **{
            "r": cfg.r,
            "lora_alpha": cfg.alpha,
            "lora_dropout": cfg.dropout,
            "target_modules": list(cfg.target_modules),
            "task_type": "CAUSAL_LM",
            **changes,
        }
    )
    return peft.get_peft_model(reference(folder), config)


def peft_parameters(model: peft.PeftModel) -> dict[str, nn.Parameter]:
    """PEFT's adapter parameters under the names they have here."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def own_parameters(model: Llama) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def copy_adapters(source: dict[str, nn.Parameter], target: dict[str, nn.Parameter]) -> None:
    assert source.keys() == target.keys()
    for name, parameter in target.items():
        parameter.copy_(source[name])


def relative(ours: Tensor, theirs: Tensor) -> float:
    """How far apart two tensors are, as a share of the second."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    theirs = theirs.detach().double()
    return ((ours.detach().double() - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def token_rows(rows: int, length: int, seed: int = 3, vocab: int = VOCAB) -> Tensor:
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def finished_run(folder: Path, base: Path, method: str = "lora", dtype: str = "float32", *targets: str) -> Path:
    """A run folder as training leaves it, with a live adapter."""
    overrides = [f"model.path={base}", f"model.dtype={dtype}", f"method={method}", f"out={folder}"]
    overrides += [f"lora.r={R}", f"lora.alpha={ALPHA}", "optim.learning_rate=1e-3"]
    overrides += [f"lora.target_modules={json.dumps(list(targets))}"] if targets else []
    cfg = load_config(overrides)
    folder.mkdir(parents=True)
    files.write_text(folder / "config.toml", dump(cfg))
    model = adapted(base, cfg.lora)
    peft_format.save(folder / "adapter", model, cfg.lora, ModelConfig(path=str(base)))
    finish(folder, base)
    return folder


def finish(run: Path, base: Path) -> None:
    """The run.json of a run that has made what lies in its folder."""
    facts = {"identity": pretrained.fingerprint(base), "finished": True, "step": 1, "finish_reason": "all steps done"}
    files.write_json(run / "run.json", facts | {"made": runs.made(run)})
