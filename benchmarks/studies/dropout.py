"""Dropout by the size of the data: the fewer rows, the more often each is seen in the same number of steps."""

import harness
from figure import Figure, Series
from harness import Bench, Finding

SIZES = (16, 64, 256)
DROPOUTS = (0.0, 0.1, 0.3)


def study(bench: Bench) -> Finding:
    task = list(bench.tasks.values())[-1]  # the real data where there is some
    sizes, dropouts = (SIZES[:1], DROPOUTS[:2]) if bench.small else (SIZES, DROPOUTS)
    grid = {
        dropout: [
            bench.measure(
                task,
                f"{size} rows, dropout {dropout:g}",
                {"method": "lora", "lora.dropout": dropout, "data.train": str(task.first(size))},
                4e-3,
            )
            for size in sizes
        ]
        for dropout in dropouts
    }
    said = "; ".join(
        f"{size} rows "
        + ", ".join(f"{row[n].mean:.3g} +- {row[n].spread:.1g} at {dropout:g}" for dropout, row in grid.items())
        for n, size in enumerate(sizes)
    )
    return Finding(
        "Does dropout help, and does that depend on how many rows there are?",
        f"Held-out loss on {task.words} by rows and dropout: {said}. A difference within the spread is none. "
        f"{task.steps} steps are few: small sets are seen several times, but nothing here is trained to its end.",
        [arm for row in grid.values() for arm in row],
        Figure(
            f"Dropout by size of the data on {task.name}",
            "rows to learn from",
            "held-out loss",
            list(map(str, sizes)),
            [Series(f"dropout {dropout:g}", [arm.losses for arm in row]) for dropout, row in grid.items()],
        ),
    )


if __name__ == "__main__":
    harness.main("dropout", study)
