"""Fine-tune a model on a Ray cluster: the same run as scripts/train.py, in the workers of Ray Train.

    python scripts/ray_train.py RECIPE.toml --num-workers 8 [key.path=value ...]

Start it in a folder that all machines see under the same name, with `out` on storage that they share: when a worker
dies, Ray starts them all again, and the run goes on from its newest checkpoint. Needs the extra `[ray]`.
"""

import os
import sys
from pathlib import Path
from typing import Any

from minitune import errors, files
from minitune.config import load_config
from minitune.errors import RunFailed, UserError

RESTARTS = 3  # how often workers may die before the run fails


def main(arguments: list[str]) -> None:
    arguments, workers = split(arguments)
    cfg = load_config(arguments)
    fit(arguments, workers, Path(cfg.out), cfg.parallel.timeout_seconds)


def split(arguments: list[str]) -> tuple[list[str], int]:
    """What is for the recipe, and the number of workers."""
    if "--num-workers" not in arguments:
        if {"-h", "--help"} & set(arguments):
            return arguments, 1
        raise UserError("say how many workers share the run, one for each GPU: --num-workers N")
    at = arguments.index("--num-workers")
    text = arguments[at + 1] if at + 1 < len(arguments) else ""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"--num-workers: must be a whole number above 0, but is {text!r}")
    return arguments[:at] + arguments[at + 2 :], int(text)


def fit(arguments: list[str], workers: int, out: Path, timeout_seconds: int, job: Any = None) -> None:
    """Run a recipe in so many workers, each of which calls `job` (`work`)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        raise UserError("Ray is not installed; pip install 'minitune[ray]'") from None

    if not ray.is_initialized():
        where = {} if os.environ.get("RAY_ADDRESS") else {"dashboard_host": "127.0.0.1"}  # it shows all to whoever asks
        ray.init(**where)
    has = ray.cluster_resources()
    gpus = int(has.get("GPU", 0))
    if workers > (gpus or has.get("CPU", 0)):
        raise UserError(
            f"--num-workers: {workers} is more than the cluster has ({gpus} GPUs, {has.get('CPU', 0):g} CPUs)"
        )
    place = out.resolve()
    ending = Path(f"{place}.ray", "ending.json")
    ending.unlink(missing_ok=True)
    trainer = TorchTrainer(
        job or work,
        train_loop_config={"arguments": arguments, "folder": os.getcwd(), "ending": str(ending)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=timeout_seconds + 10),
        run_config=RunConfig(
            name=place.name, storage_path=f"{place}.ray", failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    )
    result = trainer.fit()
    if result.error is not None or not ending.exists():
        raise RunFailed(f"workers died more than {RESTARTS} times; run it again to go on from the newest checkpoint")
    told = files.read_json(ending)
    if "wrong" in told:
        raise UserError(told["wrong"])
    print(f"{told['finish_reason']} after step {told['step']}; the run is in {out}")


def work(task: dict[str, Any]) -> None:
    """What each worker does. Ray Train has set up its process group."""
    from minitune.train import train

    os.chdir(task["folder"])
    try:
        facts = train(load_config(task["arguments"]))
        told = {key: facts[key] for key in ("finish_reason", "step")}
    except UserError as error:  # no new start would mend it
        told = {"wrong": str(error)}
    if os.environ["RANK"] == "0" or "wrong" in told:
        files.write_json(Path(task["ending"]), told)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    errors.run(main)
