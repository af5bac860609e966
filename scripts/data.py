"""Look at the data of a recipe, and train nothing.

    python scripts/data.py                                    # the built-in example
    python scripts/data.py RECIPE.toml [key.path=value ...]
        --html FILE     write a page to look at, too
        --json          print one JSON object instead

Of the model it needs the tokenizer files alone. NO_COLOR and FORCE_COLOR are heeded.
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
    cfg = load_config(rest)  # all that is wrong with the recipe is said before anything is read
    from minitune import files
    from minitune.data import prepare
    from minitune.pretrained import find
    from minitune.preview.gather import preview
    from minitune.preview.page import html
    from minitune.preview.terminal import in_colour, text
    from minitune.tokenizer import load_tokenizer

    if options.html and not options.html.parent.is_dir():
        raise UserError(f"--html: there is no folder {options.html.parent}")
    tokenizer = load_tokenizer(find(cfg.model.path, cfg.model.revision, weights=False))
    seen = preview(prepare(cfg.data, tokenizer, refuse=False), cfg.data, tokenizer)
    if options.html:
        files.write_text(options.html, html(seen))
    if options.json:
        about = asdict(seen)
        print(json.dumps(about.pop("counts") | {"preview": about}))
        return
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every character
    end = f"\nThe page is in {options.html}\n" if options.html else ""
    try:
        print(text(seen, in_colour(sys.stdout)) + end, end="", flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    errors.run(main)
