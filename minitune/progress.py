"""Where a run stands, next to its weights and moments; kept in each checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from minitune.secrets import shortened


@dataclass
class Progress:
    """Counted in optimizer steps; the first is 1."""

    step: int = 0  # steps behind us
    tokens: int = 0  # document tokens seen, padding left out
    skipped: int = 0  # steps that were not finite, so not applied
    bad_steps: int = 0  # of these, the last so many in a row
    evaluated: int = 0  # the step after which was last evaluated
    best_loss: float | None = None  # nats per token on the evaluation data
    best_step: int | None = None
    evals_without_better: int = 0
    stream: dict[str, Any] = field(default_factory=dict)  # the data cursor

    @property
    def applied(self) -> int:
        """Updates that the weights have seen."""
        return self.step - self.skipped

    def note_step(self, finite: bool) -> None:
        """Remember how a step went."""
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.skipped += not finite

    def note_evaluation(self, loss: float) -> bool:
        """Remember an evaluation; whether it is the best so far."""
        self.evaluated = self.step
        better = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if better:
            self.best_loss, self.best_step, self.evals_without_better = loss, self.step, 0
        else:
            self.evals_without_better += 1
        return better

    def worn_out(self, patience: int) -> bool:
        """Whether the last `patience` evaluations (0: no limit) brought nothing better."""
        return 0 < patience <= self.evals_without_better

    @classmethod
    def read(cls, value: Any) -> Progress:
        """From JSON that may be anybody's. Raises ValueError naming what cannot be."""
        names = [f.name for f in fields(cls)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            raise ValueError(f"its progress does not hold just {', '.join(names)}")
        for name in names:
            if not FITS.get(name, is_count)(value[name]):
                raise ValueError(f"its progress says {name} = {shortened(str(value[name]), 60)}")
        progress = cls(**value)
        if max(progress.skipped, progress.evaluated, progress.best_step or 0) > progress.step:
            raise ValueError("its progress counts more steps than there were")
        return progress


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


FITS: dict[str, Callable[[Any], bool]] = {  # all others are counts
    "best_loss": lambda value: value is None or (type(value) is float and math.isfinite(value)),
    "best_step": lambda value: value is None or is_count(value),
    "stream": lambda value: isinstance(value, dict),
}
