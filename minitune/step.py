"""One optimizer step, one evaluation, and how steps went."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from minitune import generate, optim, parallel, seeds, sharding
from minitune.config import Config
from minitune.data.packing import Batch, Corpus
from minitune.data.stream import eval_batches
from minitune.model import Llama
from minitune.signals import Stop
from minitune.tokenizer import Tokenizer


def take_step(
    model: Llama, optimizer: torch.optim.Optimizer, micro_batches: list[Batch], cfg: Config, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step over the micro-batches: loss (nats per loss token), gradient norm before clipping, and
    whether both were finite, all still on the device. If not, nothing is applied: weights and moments stay."""
    # Divide by the loss tokens of the whole step: then how it is cut into micro-batches, and over how many ranks,
    # changes nothing.
    loss_tokens = max(1, parallel.total(sum(batch.loss_tokens for batch in micro_batches)))
    loss = torch.zeros((), device=micro_batches[0].tokens.device)
    for number, batch in enumerate(micro_batches):
        torch.manual_seed(seeds.derive(cfg.seed, "dropout", step, parallel.turn(number)))
        total = model(batch.tokens, batch.positions, batch.documents, batch.labels, batch.learned)  # summed
        (total / loss_tokens).backward()
        sharding.collect_gradients(model)
        loss += total.detach() / loss_tokens

    parallel.sum_over_ranks([*sharding.whole_gradients(model), loss])
    norm, finite = optim.update(model, optimizer, cfg.optim.max_grad_norm, loss)
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, finite


@dataclass(frozen=True)
class Outcome:
    """How a step went."""

    step: int  # the first is 1
    loss: float  # nats per loss token
    norm: float  # of the gradient, before clipping
    finite: bool  # else it was not applied


class Outcomes:
    """How steps went, read when they are done and not before: a GPU has the next step to do while the host looks at
    the last one, so it never waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self.ahead = 1 if device.type == "cuda" else 0  # steps that a device may have under way
        self.under_way: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, loss: Tensor, norm: Tensor, finite: Tensor) -> None:
        numbers = torch.stack([loss.float(), norm.float(), finite.float()])
        if self.ahead:
            numbers = numbers.to("cpu", non_blocking=True)
        self.under_way.append((step, numbers, torch.cuda.current_stream().record_event() if self.ahead else None))

    def settled(self) -> list[Outcome]:
        """All steps but the one that a GPU is busy with, in order, each once; waits for them."""
        return [self.read() for _ in range(len(self.under_way) - self.ahead)]

    def all(self) -> list[Outcome]:
        """All steps, in order, each once; waits for them."""
        return [self.read() for _ in range(len(self.under_way))]

    def read(self) -> Outcome:
        step, numbers, done = self.under_way.popleft()
        if done is not None:
            done.synchronize()
        loss, norm, finite = numbers.tolist()
        self.latest = Outcome(step, loss, norm, bool(finite))
        return self.latest


@torch.no_grad()
def evaluate(
    model: Llama, corpus: Corpus, cfg: Config, tokenizer: Tokenizer, device: torch.device, stop: Stop
) -> float | None:
    """Mean loss over all loss tokens of a corpus (nats), or None if the run is asked to stop before that is known.
    Draws nothing and leaves the model as it was."""
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    batches = eval_batches(
        corpus,
        max_seq_len=cfg.data.max_seq_len,
        packing=cfg.data.packing,
        batch_size=cfg.train.batch_size,
        pad_id=tokenizer.pad_id,
        rank=parallel.rank(),
        world=parallel.world(),
    )
    with generate.evaluating(model):
        for batch in batches:
            stop.look()
            if stop:
                return None
            batch = batch.to(device)
            total += model(batch.tokens, batch.positions, batch.documents, batch.labels, batch.learned)
            tokens += batch.loss_tokens
    parallel.sum_over_ranks([total])
    return total.item() / max(1, parallel.total(tokens))
