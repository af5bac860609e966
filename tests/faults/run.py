"""Start real runs of scripts/train.py, do harm to them, and count what was lost.

    python tests/faults/run.py --tier pr                      # a minute: some of each row
    python tests/faults/run.py --tier full --out FILE.json    # all of it
    python tests/faults/run.py --tier full --only kill        # the rows with that in their name
    python tests/faults/run.py --tier full --peer             # also HF Trainer + PEFT, where a row applies to it

Prints a line a row: `name injected survived failed`, and how its negative control fared: the same injections with a
guard of minitune's taken out, some of which must be lost, else the row proves nothing. Exit 1 if anything was lost, or
a control was not.
"""

import argparse
import os
import platform
import shlex
import shutil
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=("pr", "full"), default="pr")
    parser.add_argument("--only", default="", help="rows with this in their name, or in their system's")
    parser.add_argument("--peer", action="store_true", help="also into HF Trainer + PEFT (full tier)")
    parser.add_argument("--out", type=Path, help="a JSON file for the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="injections at once")
    parser.add_argument("--keep", action="store_true", help="leave the folders of lost runs, and say where they are")
    options = parser.parse_args()
    if options.peer and options.tier != "full":
        parser.error("--peer goes with --tier full")

    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read when torch and numpy load
        os.environ[threads] = "1"
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import torch
    from table import ROWS, inject, proves, told
    from world import make_world

    import minitune.train  # noqa: F401  (what a run imports is imported before it is forked)

    if options.peer:
        import peer

        ROWS += peer.ROWS
        names = [row.name for row in ROWS]
        ROWS.sort(key=lambda row: names.index(row.name))  # beside minitune's
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        world = make_world(folder)
        print(f"{'':58}injected  survived  failed   control lost", flush=True)
        table = [told(line) for line in inject(world, options)]
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if options.out:
        from minitune import files

        files.write_json(options.out, kept(table, options))
    ours = [line for line in table if line["system"] == "minitune"]
    return 0 if all(line["failed"] == 0 and proves(line) for line in ours) else 1


def kept(table: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The table with what it came from."""
    from minitune.log import versions

    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "tests/faults/run.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores CPU, {platform.machine()}",
        "versions": versions() | peer_versions(options),
        "seed": options.seed,
        "tier": options.tier,
        "rows": [{key: value for key, value in line.items() if key != "control_losses"} for line in table],
    }


def peer_versions(options: argparse.Namespace) -> dict[str, str]:
    return {name: version(name) for name in ("transformers", "peft", "accelerate") if options.peer}


if __name__ == "__main__":
    sys.exit(main())
