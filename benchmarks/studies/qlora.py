"""QLoRA against LoRA: what does a base in four bits cost?"""

from statistics import mean, stdev

import harness
from figure import Figure, Series
from harness import Bench, Finding


def study(bench: Bench) -> Finding:
    arms, series, said, more = [], [], [], {}
    for task in bench.tasks.values():
        before = bench.untrained(task)
        lora, qlora = (bench.measure(task, method, {"method": method}, 4e-3) for method in ("lora", "qlora"))
        arms += [lora, qlora]
        worse = [100 * (b / a - 1) for a, b in zip(lora.losses, qlora.losses, strict=True)]
        lost = [100 * (b - a) / (before - lora.mean) for a, b in zip(lora.losses, qlora.losses, strict=True)]
        series.append(
            Series(task.name, [[100 * loss / lora.mean - 100 for loss in arm.losses] for arm in (lora, qlora)])
        )
        more[task.name] = {"loss_before": before, "qlora_worse_percent": worse, "share_of_gain_lost_percent": lost}
        exact = f", answers exactly right {mean(lora.exact):.0%} and {mean(qlora.exact):.0%}" if lora.exact else ""
        said.append(
            f"on {task.words} the loss is {mean(worse):+.1f} % (+- {stdev(worse):.1f} over seeds), which is "
            f"{mean(lost):.2g} % of LoRA's gain{exact}"
        )
    return Finding(
        "Is QLoRA within 1-2 % of LoRA?",
        "QLoRA in place of LoRA, the same adapter and seeds: "
        + "; ".join(said)
        + ". A model of 2M parameters, trained for so short a time, bounds nothing at 8B.",
        arms,
        Figure("QLoRA against LoRA", "method", "% above LoRA's mean loss", ["lora", "qlora"], series, (0, "LoRA")),
        more,
    )


if __name__ == "__main__":
    harness.main("qlora", study)
