"""A run under a launcher: python under.py torchrun|ray TROUBLE ARGUMENTS...; TROUBLE (JSON) befalls the first try."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jobs


def torchrun(trouble: dict[str, Any], arguments: list[str]) -> None:
    jobs.train(arguments, trouble if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else None)


def ray(trouble: dict[str, Any], arguments: list[str]) -> None:
    import ray_train
    from ray import init

    from minitune import errors

    init(num_cpus=2, dashboard_host="127.0.0.1")

    def job(task: dict[str, Any]) -> None:
        first_try = Path(trouble["mark"])
        if not first_try.exists() and int(os.environ["RANK"]) == trouble["rank"]:
            first_try.touch()
            jobs.befall(trouble["rank"], trouble["step"], trouble["what"])
        ray_train.work(task)

    def run(given: list[str]) -> None:
        given, workers = ray_train.split(given)
        cfg = ray_train.load_config(given)
        ray_train.fit(given, workers, Path(cfg.out), cfg.parallel.timeout_seconds, job)

    sys.argv = ["ray_train.py", *arguments]
    errors.run(run)


if __name__ == "__main__":
    {"torchrun": torchrun, "ray": ray}[sys.argv[1]](json.loads(sys.argv[2]), sys.argv[3:])
