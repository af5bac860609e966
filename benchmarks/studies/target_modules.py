"""Which linears to adapt: attention's, the feed-forward's or all, at one rank and at one number of parameters."""

import harness
from figure import Figure, Series
from harness import Bench, Finding

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ARMS = {  # name -> targets, rank
    "q, v": (["q_proj", "v_proj"], 16),
    "attention": (ATTENTION, 16),
    "mlp": (MLP, 16),
    "all": (ATTENTION + MLP, 16),
    "q, v at r 64": (["q_proj", "v_proj"], 64),
}


def study(bench: Bench) -> Finding:
    arms, series, said = [], [], []
    chosen = dict(list(ARMS.items())[:2]) if bench.small else ARMS
    for task in bench.tasks.values():
        found = [
            bench.measure(
                task, name, {"method": "lora", "lora.target_modules": targets, "lora.r": r, "lora.alpha": 2 * r}, 4e-3
            )
            for name, (targets, r) in chosen.items()
        ]
        arms += found
        best = min(arm.mean for arm in found)
        series.append(Series(task.name, [[100 * (loss / best - 1) for loss in arm.losses] for arm in found]))
        said.append(f"on {task.words} " + ", ".join(f"{arm.arm} {arm.mean:.3g} +- {arm.spread:.1g}" for arm in found))
    return Finding(
        "Which linears should have an adapter?",
        "Held-out loss by what is adapted: "
        + "; ".join(said)
        + ". 'q, v at r 64' has about as many parameters as 'all' at r 16, so a gap between these is of place, not of "
        "number; the order may differ in models with other proportions of attention and feed-forward.",
        arms,
        Figure("Which linears are adapted", "adapted linears", "% above the best mean loss", list(chosen), series),
    )


if __name__ == "__main__":
    harness.main("target_modules", study)
