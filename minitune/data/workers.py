"""Chunks tokenised by many processes, in order.

A worker is a program of its own, not a copy of this one: it imports no torch, so it is small, and it ends when its
stdin does, whatever became of the process that started it. Tasks come in by its stdin, portions leave by its stdout,
as JSON and plain arrays.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer as Engine

import minitune
from minitune.config import DataConfig
from minitune.data.readers import Chunk
from minitune.data.tokenise import Portion, Task, tokenise
from minitune.errors import RunFailed, UserError
from minitune.tokenizer import Tokenizer

MOST = 32  # processes
FEW = 4  # up to so many, this process is one of them; what more of them send takes its time
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenised(tasks: Iterable[Task], cfg: DataConfig, tokenizer: Tokenizer, processes: int) -> Iterator[Portion]:
    """The portion of each task, in order. Of few processes this is one: it is at work while the others start."""
    processes = min(processes, MOST)
    here = [Here(cfg, tokenizer)] if processes <= FEW else []
    workers = [Worker(cfg, tokenizer) for _ in range(processes - len(here))]
    if not workers:
        yield from map(here[0].portion, tasks)
        return
    yield from shared_out(tasks, here, workers)


def shared_out(tasks: Iterable[Task], here: list["Here"], workers: list["Worker"]) -> Iterator[Portion]:
    everyone = [*here, *workers]
    idle = deque(everyone)
    threads = ThreadPoolExecutor(len(everyone))  # each waits for a worker; at most so many tasks are under way

    def portion(task: Task) -> Portion:
        worker = idle.popleft()
        try:
            return worker.portion(task)
        finally:
            idle.append(worker)

    under_way: deque[Future[Portion]] = deque()
    try:
        for task in tasks:
            under_way.append(threads.submit(portion, task))
            if len(under_way) == 2 * len(everyone):
                yield first_of(under_way)
        while under_way:
            yield first_of(under_way)
    finally:
        for worker in everyone:
            worker.end()
        threads.shutdown(cancel_futures=True)


def first_of(under_way: deque[Future[Portion]]) -> Portion:
    """The first portion, taken away; the error of any of them as soon as it is there."""
    others = set(under_way)
    while not under_way[0].done():
        done, others = wait(others, return_when=FIRST_COMPLETED)
        for each in done:
            each.result()
    return under_way.popleft().result()


class Here:
    """This process, as one that tokenises."""

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self.ended = Event()

    def portion(self, task: Task) -> Portion:
        return tokenise(task, self.cfg, self.tokenizer, self.ended)

    def end(self) -> None:
        """Whatever is under way is left soon."""
        self.ended.set()


class Worker:
    """A process that tokenises, as the one that gives it work sees it."""

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer) -> None:
        here = str(Path(minitune.__file__).parents[1])  # so that it runs this minitune, installed or not
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from minitune.data.workers import work; work()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ONE_THREAD | {"PYTHONPATH": path},
        )
        self.setting = {"cfg": asdict(cfg), "tokenizer": stated(tokenizer)}  # sent before the first task

    def portion(self, task: Task) -> Portion:
        try:
            if self.setting:
                send(self.process.stdin, self.setting)
                self.setting = None
            send(self.process.stdin, asdict(task))
            answer = json.loads(self.process.stdout.readline() or "null")
        except (OSError, ValueError):
            answer = None
        if answer is None:
            raise RunFailed(
                f"a process that tokenises {task.chunk.path} has ended (exit code {self.process.wait()}); "
                "if it was killed for memory, make some free and run again"
            )
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        if "error" in answer:
            raise RuntimeError(f"in a process that tokenises {task.chunk.path}:\n{answer['error']}")
        arrays = {name: receive(self.process.stdout, *kind) for name, *kind in answer["arrays"]}
        sketches, marked = arrays.pop("sketches"), arrays.pop("marked")
        reasons = [(key, reason) for key, reason in answer["reasons"]]
        return Portion(arrays, sketches, marked, answer["categories"], reasons)

    def end(self) -> None:
        self.process.kill()
        with suppress(OSError):  # what was still to be sent has no one to read it
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def work() -> None:
    """What a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that gave the work is told, and ends it
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is not mixed with the answers
    sent = received(sys.stdin.buffer)
    if (setting := next(sent, None)) is None:
        return
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in setting["cfg"].items()}
    cfg, tokenizer = DataConfig(**lists), restored(setting["tokenizer"])
    try:
        for task in sent:
            answer(out, Task(**task | {"chunk": Chunk(**task["chunk"])}), cfg, tokenizer)
    except BrokenPipeError:  # the one that gave the work has ended
        os._exit(1)  # without a word, and without another try to send the rest


def received(stream: BinaryIO) -> Iterator[Any]:
    """What was sent, as far as it is whole: the sender may have ended in the middle of it."""
    for line in stream:
        if line.endswith(b"\n"):
            yield json.loads(line)


def answer(out: BinaryIO, task: Task, cfg: DataConfig, tokenizer: Tokenizer) -> None:
    try:
        portion = tokenise(task, cfg, tokenizer)
    except UserError as error:
        send(out, {"user_error": str(error)})
        return
    except BaseException:  # a library's panic is no Exception
        send(out, {"error": traceback.format_exc()})
        return
    arrays = portion.columns | {"sketches": portion.sketches, "marked": portion.marked}
    kinds = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    send(out, {"arrays": kinds, "categories": portion.categories, "reasons": portion.reasons})
    for array in arrays.values():
        out.write(np.ascontiguousarray(array))
    out.flush()


def send(stream: BinaryIO, value: object) -> None:
    stream.write(json.dumps(value).encode() + b"\n")
    stream.flush()


def receive(stream: BinaryIO, dtype: str, shape: list[int]) -> np.ndarray:
    array = np.empty(shape, dtype)
    if array.nbytes and stream.readinto(memoryview(array).cast("B")) != array.nbytes:
        raise RunFailed("a process that tokenises has ended in the middle of an answer")
    return array


# ---- a tokenizer in words ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def stated(tokenizer: Tokenizer) -> dict[str, Any]:
    """All that a tokenizer is, for JSON; what it makes of a text follows from this and the library's version."""
    engine, continuation = tokenizer.engine.to_str(), tokenizer.continuation.to_str()
    return vars(tokenizer) | {
        "engine": engine,
        "continuation": None if continuation == engine else continuation,
        "stop_ids": sorted(tokenizer.stop_ids),
    }


def restored(state: dict[str, Any]) -> Tokenizer:
    engine = Engine.from_str(state["engine"])
    continuation = Engine.from_str(state["continuation"]) if state["continuation"] else engine
    whole = {"engine": engine, "continuation": continuation, "stop_ids": frozenset(state["stop_ids"])}
    return Tokenizer(**state | whole)
