"""scripts/train.py on a GPU that stays behind the host: what happens to be in time elsewhere comes too late here.

torchrun --nproc-per-node 2 tests/gpu/behind.py KEY=VALUE ...
"""

import torch
from torch import nn

from minitune import build, errors
from minitune.config import load_config
from minitune.train import train

CYCLES = 10**8  # about 50 ms, in which the host passes on more than a whole step of a small model


def main(arguments: list[str]) -> None:
    fill = build.fill

    def then_delay(model: nn.Module, *rest: object) -> None:
        fill(model, *rest)
        model.loss.register_forward_hook(lambda *_: torch.cuda._sleep(CYCLES))

    build.fill = then_delay
    train(load_config(arguments))


if __name__ == "__main__":
    errors.run(main)
