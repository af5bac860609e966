"""Held-out prompts answered before and after training: what the loss does not show."""

from collections.abc import Iterator
from typing import Any

from minitune import generate, sharding
from minitune.config import Config
from minitune.data import Sample
from minitune.errors import UserError
from minitune.log import say
from minitune.model import Llama, LlamaConfig
from minitune.tokenizer import Tokenizer


class Samples:
    """Held-out prompts answered before and after training, side by side, and how many are exactly right."""

    SHOWN = 3
    AT_ONCE = 50  # prompts in one batch

    def __init__(self, cfg: Config, model: Llama, tokenizer: Tokenizer, samples: list[Sample]) -> None:
        self.model, self.tokenizer, self.samples = model, tokenizer, samples
        self.longest_answer = cfg.eval.sample_tokens
        self.scores: dict[str, float] = {}  # share of exact matches
        self.answers: dict[str, list[str]] = {}

    def answer(self, when: str) -> None:
        """Answer all prompts, greedily; with "after", show what changed."""
        if not self.samples:
            return
        ids = []
        with sharding.gathered_head(self.model):
            for some in chunks(self.samples, self.AT_ONCE):
                prompts = [sample.prompt_ids for sample in some]
                ids += generate.generate(self.model, prompts, self.longest_answer, self.tokenizer.stop_ids)
        answers = self.answers[when] = [self.tokenizer.decode(answer).strip() for answer in ids]
        right = sum(answer == sample.answer.strip() for answer, sample in zip(answers, self.samples, strict=True))
        self.scores[when] = right / len(answers)
        say(f"{when} training: {right} of {len(answers)} held-out prompts answered exactly ({self.scores[when]:.0%})")
        if when == "after":
            for number, sample in enumerate(self.samples[: self.SHOWN]):
                say(f"\n{sample.prompt_text.rstrip()}")
                say(f"  before:   {self.answers['before'][number]!r}")
                say(f"  after:    {answers[number]!r}")
                say(f"  expected: {sample.answer.strip()!r}")


def check_samples_fit(cfg: Config, samples: list[Sample], config: LlamaConfig) -> None:
    """Refuse, before the model loads, prompts that leave no room for an answer."""
    longest = max((len(sample.prompt_ids) for sample in samples), default=0)
    if samples and longest + cfg.eval.sample_tokens > config.max_position_embeddings:
        raise UserError(
            f"eval.sample_tokens: {cfg.eval.sample_tokens} on top of a held-out prompt of {longest} tokens pass the "
            f"model's {config.max_position_embeddings} positions; lower it, or set eval.samples = 0"
        )


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
