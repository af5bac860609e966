"""Look at what a recipe trains and costs, or at what an adapter has learned.

    python scripts/explain.py                                 # the built-in example
    python scripts/explain.py RECIPE.toml [key.path=value ...]
    python scripts/explain.py FOLDER                          # a run, a checkpoint of one, an adapter folder
        --html FILE     write a page to look at, too
        --json          print one JSON object instead

For a recipe no weights are needed: it is counted, not measured. NO_COLOR and FORCE_COLOR are heeded.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from minitune import errors
from minitune.config import load_config
from minitune.errors import UserError


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--html", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        print(__doc__)
    folder = next((Path(each) for each in rest if Path(each).is_dir()), None)
    if folder and len(rest) > 1:
        raise UserError(
            f"{folder} is explained as it is; leave out {next(each for each in rest if each != str(folder))}"
        )
    cfg = None if folder else load_config(rest)
    if options.html and not options.html.parent.is_dir():
        raise UserError(f"--html: there is no folder {options.html.parent}")
    if options.html and options.html.is_dir():
        raise UserError(f"--html: {options.html} is a folder; name a file in it")
    from minitune import files
    from minitune.explain import page, recipe, terminal, updates
    from minitune.preview.terminal import in_colour

    if folder:
        view, html, text = updates.view(folder), page.updates_html, terminal.updates_text
    else:
        view, html, text = recipe.view(cfg), page.recipe_html, terminal.recipe_text
    if options.html:
        files.write_text(options.html, html(view))
    if options.json:
        print(json.dumps(asdict(view)))
        return
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character
    end = f"\nThe page is in {options.html}\n" if options.html else ""
    try:
        print(text(view, in_colour(sys.stdout)) + end, end="", flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    errors.run(main)
