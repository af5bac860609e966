"""How much memory a run needs, before it runs. Bytes, all of them; the coefficients say where they come from."""

from dataclasses import dataclass

from torch import nn

from minitune.config import Config
from minitune.loss import CHUNK
from minitune.model import LlamaConfig
from minitune.precision import DTYPES


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, by part."""

    weights: int  # frozen and trained
    casts: int  # copies in the model's dtype of weights that train in fp32, kept between forward and backward
    training: int  # gradients and moments of what trains
    activations: int  # kept between forward and backward, without recompute
    recomputed: int  # the same when every block is recomputed
    head: int  # one piece of the loss

    def total(self, recompute: bool) -> int:
        kept = self.recomputed if recompute else self.activations + self.casts
        return self.weights + self.training + self.head + kept


def memory(model: nn.Module, config: LlamaConfig, cfg: Config) -> Memory:
    """From the parameters as they stand (the meta device is enough) and the shape of a micro-batch."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = {"adamw": 8, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2}[cfg.optim.name]
    tokens = cfg.train.batch_size * cfg.data.max_seq_len
    width = DTYPES[cfg.model.dtype].itemsize
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    # A block keeps its input, two norms (in and out), q k v rotated, attention's output, gate, up, silu, product.
    block = width * (7 * D + heads + 4 * F)
    dropped = 0 if cfg.method == "full" or cfg.lora.dropout == 0 else width * (3 * D + 2 * F)  # masked copies of inputs
    return Memory(
        weights=sum(p.nbytes for p in model.parameters()),
        casts=width * trained if width == 2 else 0,
        training=trained * (4 + moments),
        activations=tokens * L * (block + dropped),
        recomputed=tokens * (L * width * D + block + dropped),
        head=min(tokens, CHUNK) * V * (width + 3 * 4),  # logits, and their fp32 copy, softmax and gradient
    )


def recompute_needed(need: Memory, free: int) -> bool:
    """Whether blocks must be recomputed to fit: kept when they take at most nine tenths of what is free."""
    return need.total(recompute=False) > 0.9 * free
