"""Look at what a recipe trains and costs, or at what an adapter has learned.

    python scripts/explain.py                                 # the built-in example
    python scripts/explain.py RECIPE.toml [key.path=value ...]
    python scripts/explain.py FOLDER                          # a run, a checkpoint of one, an adapter folder
        --html FILE     write a page to look at, too
        --json          print one JSON object instead

For a recipe no weights are needed: it is counted, not measured. NO_COLOR and FORCE_COLOR are heeded.
"""

from dataclasses import asdict
from pathlib import Path

from minitune import errors, views
from minitune.config import load_config
from minitune.errors import UserError


def main(arguments: list[str]) -> None:
    wanted, rest = views.wanted(arguments, usage=__doc__)
    folder = next((Path(each) for each in rest if Path(each).is_dir()), None)
    if folder and len(rest) > 1:
        other = next((each for each in rest if Path(each) != folder), f"the second {folder}")
        raise UserError(f"{folder} is explained as it is; leave out {other}")
    if nowhere := [each for each in rest if "/" in each and "=" not in each and not Path(each).exists()]:
        raise UserError(f"{nowhere[0]}: there is no such recipe or folder")
    cfg = None if folder else load_config(rest)
    from minitune.explain import page, recipe, terminal, updates

    if folder:
        view, html, text = updates.view(folder), page.updates_html, terminal.updates_text
    else:
        view, html, text = recipe.view(cfg), page.recipe_html, terminal.recipe_text
    views.show(wanted, lambda colour: text(view, colour), lambda: html(view), lambda: asdict(view))


if __name__ == "__main__":
    errors.run(main)
