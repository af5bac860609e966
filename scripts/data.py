"""Look at the data of a recipe, and train nothing.

    python scripts/data.py                                    # the built-in example
    python scripts/data.py RECIPE.toml [key.path=value ...]
        --html FILE     write a page to look at, too
        --json          print one JSON object instead

Of the model it needs the tokenizer files alone. NO_COLOR and FORCE_COLOR are heeded.
"""

from dataclasses import asdict
from typing import Any

from minitune import errors, views
from minitune.config import load_config


def main(arguments: list[str]) -> None:
    wanted, rest = views.wanted(arguments, usage=__doc__)
    cfg = load_config(rest)  # all that is wrong with the recipe is said before anything is read
    from minitune.data import prepare
    from minitune.pretrained import find
    from minitune.preview.gather import preview
    from minitune.preview.page import html
    from minitune.preview.terminal import text
    from minitune.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(find(cfg.model.path, cfg.model.revision, weights=False))
    seen = preview(prepare(cfg.data, tokenizer, refuse=False), cfg.data, tokenizer)

    def counts_and_preview() -> dict[str, Any]:
        about = asdict(seen)
        return about.pop("counts") | {"preview": about}

    views.show(wanted, lambda colour: text(seen, colour), lambda: html(seen), counts_and_preview)


if __name__ == "__main__":
    errors.run(main)
