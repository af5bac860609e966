"""Alpha and the learning rate: the same knob twice, or two? Nothing is searched here; the whole grid is shown."""

from statistics import mean

import harness
from figure import Figure, Series
from harness import Bench, Finding

ALPHAS = (4, 16, 64, 256)
RATES = (4e-4, 1.26e-3, 4e-3, 1.26e-2, 4e-2)


def study(bench: Bench) -> Finding:
    task = list(bench.tasks.values())[-1]  # the real data where there is some
    alphas, rates = (ALPHAS[:2], RATES[:1]) if bench.small else (ALPHAS, RATES)
    grid = {
        alpha: [bench.repeat(task, f"alpha = {alpha}", {"method": "lora", "lora.alpha": alpha}, rate) for rate in rates]
        for alpha in alphas
    }
    best = {alpha: min(row, key=lambda arm: arm.mean) for alpha, row in grid.items()}
    said = ", ".join(
        f"{alpha}: {arm.mean:.3g} +- {arm.spread:.1g} at {arm.learning_rate:g}" for alpha, arm in best.items()
    )
    apart = max(arm.mean for arm in best.values()) / min(arm.mean for arm in best.values()) - 1
    middle = len(rates) // 2
    fixed = max(row[middle].mean for row in grid.values()) / min(row[middle].mean for row in grid.values()) - 1
    return Finding(
        "Must alpha be tuned besides the learning rate?",
        f"Best held-out loss on {task.words} by alpha (r 16): {said}. Each alpha at its own best rate, the losses are "
        f"{apart:.1%} apart; all at the one rate {rates[middle]:g}, {fixed:.1%}. "
        "AdamW's steps do not grow with the gradient, so alpha scales how far a step moves the weight, "
        "as the rate does, but not the same way early, when B is zero. "
        f"One rank, one task, {task.steps} steps.",
        [arm for row in grid.values() for arm in row],
        Figure(
            f"Alpha and learning rate on {task.name}",
            "learning rate",
            "held-out loss",
            [f"{rate:g}" for rate in rates],
            [Series(f"alpha {alpha}", [arm.losses for arm in row]) for alpha, row in grid.items()],
        ),
        {"spread_between_best_percent": 100 * apart, "mean_of_best": mean(arm.mean for arm in best.values())},
    )


if __name__ == "__main__":
    harness.main("alpha", study)
