"""LoRA against full fine-tuning, by rank: how much of what full fine-tuning gains does each rank gain?"""

from statistics import mean

import harness
from figure import Figure, Series
from harness import Bench, Finding

RANKS = (1, 4, 16, 64)


def study(bench: Bench) -> Finding:
    arms, series, said, more = [], [], [], {}
    ranks = RANKS[-2:] if bench.small else RANKS
    for task in bench.tasks.values():
        before = bench.untrained(task)
        full = bench.measure(task, "full", {"method": "full"}, 1e-3)
        loras = [
            bench.measure(task, f"r = {r}", {"method": "lora", "lora.r": r, "lora.alpha": 2 * r}, 4e-3) for r in ranks
        ]
        arms += [full, *loras]
        shares = {
            arm.arm: [100 * (before - loss) / (before - full.mean) for loss in arm.losses] for arm in (*loras, full)
        }
        series.append(Series(task.name, list(shares.values())))
        more[task.name] = {"loss_before": before, "share_of_full_gain_percent": shares}
        gained = ", ".join(f"{mean(some):.1f} %" for some in list(shares.values())[:-1])
        exact = ""
        if full.exact:
            exact = f"; of the answers {mean(full.exact):.0%} are exactly right after full, " + ", ".join(
                f"{mean(arm.exact):.0%} at {arm.arm}" for arm in loras
            )
        said.append(f"on {task.words} {gained} (loss {full.mean:.3g} after full, {before:.3g} before{exact})")
    return Finding(
        "Does LoRA reach 90-98 % of full fine-tuning, and from which rank?",
        f"LoRA at rank {', '.join(map(str, ranks))} gains of what full fine-tuning gains in held-out loss: "
        + "; ".join(said)
        + ". So it depends on what is counted: a share of the loss flatters an arm whose answers are not right yet. "
        "This is one short run of a model of 2M parameters whose "
        "full fine-tuning trains the (tied) embedding as well; of larger models and longer training it says nothing.",
        arms,
        Figure(
            "LoRA against full fine-tuning",
            "rank",
            "% of full's gain",
            [*map(str, ranks), "full"],
            series,
            (100, "full fine-tuning"),
        ),
        more,
    )


if __name__ == "__main__":
    harness.main("rank", study)
