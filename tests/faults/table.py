"""Make the injections, some at once, and count: the workings of run.py."""

import argparse
import json
import os
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import corruption
import disk
import folders
import hostile
import kills
import nonsense
import poison
import rotation
import signals
from forked import Lost
from rows import Case, Row
from world import World

FAMILIES = [kills, signals, corruption, nonsense, disk, rotation, poison, folders, hostile]
ROWS: list[Row] = [row for family in FAMILIES for row in family.ROWS]


NO_RESULT = ("the harness failed: the process that made the injection died", 0.0)


@dataclass(frozen=True)
class Task:
    """An injection to be made: number `index` of `count` of a row, or of its control."""

    row: int
    index: int
    count: int
    control: bool


def inject(world: World, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Make all injections, some at once; yields the table's lines, in order."""
    chosen = [number for number, row in enumerate(ROWS) if options.only in f"{row.name}, {row.system}"]
    tasks = []
    for number in chosen:
        row = ROWS[number]
        count = row.full if options.tier == "full" else row.pr
        tasks += [Task(number, index, count, False) for index in range(count)]
        tasks += [Task(number, index, row.controls, True) for index in range(row.controls)]
    waiting = {number: [task for task in tasks if task.row == number] for number in chosen}
    ended: dict[Task, tuple[str, float]] = {}  # why it was lost ("": it was not), seconds
    started = time.monotonic()
    for task, why, seconds in in_workers(tasks, world, options):
        ended[task] = why, seconds
        while chosen and all(task in ended for task in waiting[chosen[0]]):
            yield line_of(ROWS[chosen[0]], {task: ended[task] for task in waiting[chosen.pop(0)]})
    for number in chosen:  # of which something is missing
        yield line_of(ROWS[number], {task: ended.get(task, NO_RESULT) for task in waiting[number]})
    print(f"{time.monotonic() - started:.0f} s")


def line_of(row: Row, ended: dict[Task, tuple[str, float]]) -> dict[str, Any]:
    lost = [why for task, (why, _) in ended.items() if why and not task.control]
    controls = [why for task, (why, _) in ended.items() if task.control]
    injected = (len(ended) - len(controls)) * row.weight
    failed = len(lost)
    return {
        "name": row.name,
        "system": row.system,
        "injected": injected,
        "survived": injected - failed,
        "failed": failed,
        "control": {"injected": len(controls), "lost": sum(why.startswith("lost") for why in controls)},
        "seconds": round(sum(seconds for _, seconds in ended.values()), 1),
        "losses": [f"{times} times {why}" for why, times in Counter(lost).most_common()],
        "control_losses": controls,
    }


def told(line: dict[str, Any]) -> dict[str, Any]:
    """Print a line of the table, and what was lost."""
    lost, controls = line["control"]["lost"], line["control"]["injected"]
    name = line["name"] if line["system"] == "minitune" else f"{line['name']}, {line['system']}"
    control = f"{lost} of {controls}" if controls else "-"
    print(f"{name:58}{line['injected']:8}{line['survived']:10}{line['failed']:8}   {control}", flush=True)
    if line["system"] == "minitune":
        for why in line["losses"][:10]:
            print(f"    {why}")
    if not proves(line):
        print(f"    the control was not lost, so the row proves nothing {line['control_losses'][0]}")
    return line


def proves(line: dict[str, Any]) -> bool:
    """Whether the row can fail: some of its control did. A peer's row is a measurement, and has none."""
    return line["system"] != "minitune" or line["control"]["lost"] > 0


# ---- workers -------------------------------------------------------------------------------------------------------


def in_workers(tasks: list[Task], world: World, options: argparse.Namespace) -> Iterator[tuple[Task, str, float]]:
    """Run tasks in forked processes of one thread each, which can fork runs in their turn."""
    numbers, give = os.pipe()
    take, results = os.pipe()
    workers = []
    for _ in range(options.jobs):
        pid = os.fork()
        if pid == 0:
            os.close(give)
            os.close(take)
            try:
                work(numbers, results, tasks, world, options)
            finally:
                os._exit(0)  # this is not the process that has the table to print
        workers.append(pid)
    os.close(numbers)
    os.close(results)
    feeder = os.fork()
    if feeder == 0:  # a pipe holds only so many numbers
        with os.fdopen(give, "wb") as file:
            file.writelines(number.to_bytes(4, "little") for number in range(len(tasks)))
        os._exit(0)
    os.close(give)
    with os.fdopen(take) as lines:
        for line in lines:
            number, why, seconds = json.loads(line)
            yield tasks[number], why, seconds
    for pid in (*workers, feeder):
        os.waitpid(pid, 0)


def work(numbers: int, results: int, tasks: list[Task], world: World, options: argparse.Namespace) -> None:
    while number := os.read(numbers, 4):
        at = int.from_bytes(number, "little")
        started = time.monotonic()
        why = attempt(tasks[at], world, options)
        line = json.dumps([at, why[:800], round(time.monotonic() - started, 2)]) + "\n"
        os.write(results, line.encode())  # short enough to arrive whole


def attempt(task: Task, world: World, options: argparse.Namespace) -> str:
    """Make one injection; "" if the run survived it, else what happened."""
    row = ROWS[task.row]
    folder = world.folder / f"{task.row}-{'control' if task.control else 'case'}-{task.index}"
    folder.mkdir()
    draw = random.Random(f"{options.seed} {row.name} {task.index} {task.control}")
    why = ""
    try:
        (row.control if task.control else row.inject)(Case(world, task.index, task.count, draw, folder))
    except Lost as lost:
        why = f"lost: {lost}".replace(str(folder), "FOLDER")
    except Exception:
        why = f"the harness failed: {traceback.format_exc()[-500:]}"
    if options.keep and why and not task.control:
        return f"{why} ({folder})"
    shutil.rmtree(folder, ignore_errors=True)
    return why
