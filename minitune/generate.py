"""Let a model write: greedy or sampled, many prompts at once, with a cache of keys and values.

The cache is a leaf like any other: while it is in use it takes the place of each block's attention core.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import adapters, peft_format, pretrained, runs
from minitune.attention import Documents
from minitune.build import build_model
from minitune.config import Config
from minitune.data.templates import instruction_ids
from minitune.errors import UserError
from minitune.model import Llama
from minitune.tokenizer import Tokenizer, load_tokenizer


@torch.no_grad()
def generate(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: frozenset[int],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """The ids that go on after each prompt, up to max_new_tokens or a stop id (which is left out).

    temperature 0 takes the likeliest token each time; above, tokens are drawn from the softmax of logits / temperature.
    """
    if not all(prompts):
        raise UserError("the prompt is empty, and this tokenizer puts nothing before it; give some text")
    if (highest := max(map(max, prompts))) >= model.config.vocab_size:
        raise UserError(f"the prompt holds the id {highest}, and the model knows only {model.config.vocab_size} tokens")
    longest = max(len(prompt) for prompt in prompts)
    room = model.config.max_position_embeddings - longest
    if room < max_new_tokens:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones pass the model's "
            f"{model.config.max_position_embeddings} positions; shorten the prompt or ask for at most {max(room, 0)}"
        )
    device = next(model.parameters()).device
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T), padded at the left
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    draw = torch.Generator(device).manual_seed(seed)

    written: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    with evaluating(model), kv_cache(model, real, max_new_tokens), torch.compiler.set_stance("force_eager"):
        for _ in range(max_new_tokens):
            hidden = model.model(tokens, positions, None)  # (B, T, D)
            logits = model.lm_head(hidden[:, -1]).float()  # (B, V): of the last place alone
            chosen = choose(logits, temperature, draw)  # (B,)
            for row, token in enumerate(chosen.tolist()):
                if row in going and token in stop_ids:
                    going.discard(row)
                elif row in going:
                    written[row].append(token)
            if not going:
                break
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
    return written


def prompt_ids(
    tokenizer: Tokenizer, recipe: Config | None, prompt: str | None, instruction: str, input_: str
) -> list[int]:
    """Ids of a prompt as it stands, or of an instruction in the template that the recipe trained with."""
    if prompt is not None:
        ids = tokenizer.encode(prompt)
        return [tokenizer.bos_id, *ids] if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id] else ids
    if recipe is None:
        raise UserError("--instruction needs a run folder, whose recipe says in which template; give --prompt instead")
    return instruction_ids(instruction, input_, recipe.data.template, tokenizer)


def choose(logits: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    """Logits (B, V) -> token ids (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=draw)[:, 0]


class CachedAttention(nn.Module):
    """An attention core that remembers: new queries see all keys so far, padding left out."""

    def __init__(self, real: Tensor, room: int) -> None:
        """`real` (B, T): False where the prompt is padding. `room`: how many tokens will follow it."""
        super().__init__()
        self.real = F.pad(real, (0, room), value=True)  # (B, S)
        self.length = 0
        self.keys = self.values = torch.empty(0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        B, T, K, h = k.shape
        if self.length == 0:
            self.keys, self.values = (x.new_empty(B, self.real.shape[1], K, h) for x in (k, v))
        start, end = self.length, self.length + T
        self.keys[:, start:end], self.values[:, start:end] = k, v
        self.length = end

        causal = torch.ones(T, end, dtype=torch.bool, device=q.device).tril(start)
        itself = torch.eye(T, end, dtype=torch.bool, device=q.device).roll(start, 1)  # padding sees itself, or is NaN
        seen = (causal & self.real[:, None, :end]) | itself  # (B, T, end)
        q, k, v = (x.transpose(1, 2) for x in (q, self.keys[:, :end], self.values[:, :end]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True).transpose(1, 2)


@contextmanager
def kv_cache(model: Llama, real: Tensor, room: int) -> Iterator[None]:
    """Within the block, attention remembers keys and values from call to call."""
    attentions = [layer.self_attn for layer in model.layers]
    cores = [attention.core for attention in attentions]
    for attention in attentions:
        attention.core = CachedAttention(real, room)
    try:
        yield
    finally:
        for attention, core in zip(attentions, cores, strict=True):
            attention.core = core


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block dropout is off; afterwards every part of the model is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def open_model(path: str) -> tuple[Llama, Tokenizer, Config | None]:
    """The model of a run, adapter or model folder (or Hub id), its tokenizer, and the recipe if it is a run."""
    folder = Path(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (folder / "config.toml").exists():
        cfg, base = runs.open_run(folder)
        if cfg.method == "full":
            return pretrained.load(folder / "model", cfg.model.dtype, device), load_tokenizer(base), cfg
        model = build_model(cfg, base, device)
        peft_format.load(folder / "adapter", model)
        return model.eval(), load_tokenizer(base), cfg
    lora = None
    if (folder / peft_format.CONFIG).exists():
        lora, where = peft_format.read_config(folder)
        base = pretrained.find(where.path, where.revision)
    else:
        base = pretrained.find(path)
    if lora is not None:
        with torch.device("meta"):  # before anything takes memory for the ranks that the folder asks for
            shapes = Llama(pretrained.read_config(base))
        adapters.attach(shapes, lora)
        peft_format.check_fits(folder, shapes)
    tokenizer = load_tokenizer(base)
    model = pretrained.load(base, "bfloat16" if device.type == "cuda" else "float32", device)
    if lora is not None:
        adapters.attach(model, lora)
        peft_format.load(folder, model)
    return model.eval(), tokenizer, None
