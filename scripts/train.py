"""Fine-tune a model.

    python scripts/train.py                                   # the built-in example, two minutes on a laptop
    python scripts/train.py RECIPE.toml [key.path=value ...]
    python scripts/train.py --help                            # every key with its default

Run it again to go on from the newest checkpoint.
"""

from minitune import errors
from minitune.config import load_config


def main(arguments: list[str]) -> None:
    cfg = load_config(arguments)  # all that is wrong with the recipe is said before torch is loaded
    from minitune.train import train

    train(cfg)


if __name__ == "__main__":
    errors.run(main)
