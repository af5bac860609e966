"""Fine-tune a model by a recipe: the whole run, top to bottom.

Read `train` first: it prepares, loops, and hands over. What a model is made of is in build.py.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitune import (
    build,
    checkpoint,
    files,
    lock,
    optim,
    parallel,
    peft_format,
    pretrained,
    runs,
    shards,
    trouble,
)
from minitune.config import Config, dump
from minitune.data import Prepared, prepare
from minitune.data.packing import Batch, Corpus, fill
from minitune.data.stream import Stream
from minitune.errors import Interrupted, RunFailed, UserError
from minitune.identity import identity_of, written
from minitune.log import NoLog, RunLog, Speed, count, say, versions
from minitune.model import Llama
from minitune.precision import DTYPES
from minitune.preview.documents import glance
from minitune.progress import Progress
from minitune.resume import load_trained, resume, unfit
from minitune.samples import Samples, check_samples_fit
from minitune.saver import Saver
from minitune.signals import Stop, stop_signals
from minitune.step import Outcome, Outcomes, evaluate, take_step
from minitune.terminal import outlived
from minitune.tokenizer import Tokenizer, load_tokenizer

BAD_STEPS = 3  # non-finite steps in a row that end a run


def train(cfg: Config) -> dict[str, Any]:
    """Run a recipe to its end, from its newest checkpoint if there is one; returns what run.json holds.

    Raises:
        UserError: the recipe, the data or the model folder is wrong (before the model loads, where it can be known),
            or another run is in the folder.
        Interrupted: SIGTERM, SIGINT or SIGHUP came; a checkpoint was written if there was anything to save.
        RunFailed: the disk, the memory or a worker gave out, or three steps in a row had no finite loss or gradient.
    """
    started = time.time()
    with (
        outlived(),
        stop_signals() as stop,
        parallel.processes(cfg.train.deterministic, cfg.parallel.timeout_seconds) as device,
        trouble.told(cfg),
    ):
        stop.among = parallel.highest
        task = make_task(cfg, device)
        if cfg.train.resume == "never":
            parallel.on_first(lambda: runs.set_aside(task.folder))
        else:  # whose it is comes before what is left of it
            parallel.on_first(lambda: runs.refuse_another(task.folder, task.identity))
        if (finished := parallel.of_first(lambda: runs.finished(task.folder))) is not None:
            say(f"{task.folder} is finished ({finished['finish_reason']} at step {finished['step']}); nothing to do")
            return finished

        parallel.on_first(lambda: files.make_folder(task.folder))
        with parallel.first_in(lambda: lock.hold(task.folder)):
            return run(task, stop, started)


@dataclass(frozen=True)
class Task:
    """What a recipe comes to, before any weight is loaded."""

    cfg: Config
    device: torch.device
    folder: Path  # the run's
    base: Path  # the model's folder
    tokenizer: Tokenizer
    data: Prepared
    stream: Stream
    steps: int
    identity: dict[str, Any]  # secrets and all; `written` is for files


def make_task(cfg: Config, device: torch.device) -> Task:
    """Check and read all that can be without loading the model."""
    folder = Path(cfg.out).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: {folder} is a file; name a folder for the run")
    base = parallel.machine_first(lambda: pretrained.find(cfg.model.path, cfg.model.revision))
    if Path(cfg.model.path).is_dir():  # what is written down must be found from any folder
        cfg = replace(cfg, model=replace(cfg.model, path=str(base.resolve())))
    tokenizer = load_tokenizer(base)
    config = pretrained.read_config(base)
    pretrained.check_fits(config, cfg.data.max_seq_len, tokenizer.vocab_size)
    data = parallel.machine_first(lambda: prepare(cfg.data, tokenizer, cfg.eval.samples))
    parallel.check_same("the documents that come of data.train", data.train.digest)
    check_samples_fit(cfg, data.samples, config)
    stream = make_stream(cfg, data.train, tokenizer)
    data.counts.update(
        packed_rows=stream.rows_per_epoch,
        fill=round(fill(data.train.lengths, stream.rows_per_epoch, cfg.data.max_seq_len), 4),
    )
    steps = cfg.train.max_steps or cfg.train.num_epochs * stream.steps_per_epoch
    identity = identity_of(cfg, parallel.of_first(lambda: pretrained.fingerprint(base)), data.digests)
    identity |= {
        "the documents made of the data": data.train.digest,
        "rows of a step (train.batch_size x train.gradient_accumulation_steps x processes)": stream.rows_per_step,
        "steps": steps,  # the learning rate of every step depends on it
    }
    return Task(cfg, device, folder, base, tokenizer, data, stream, steps, identity)


def run(task: Task, stop: Stop, started: float) -> dict[str, Any]:
    """Build the model, go on from the newest checkpoint, train, hand over."""
    cfg, folder, data = task.cfg, task.folder, task.data
    parallel.on_first(lambda: runs.refuse_others(folder))
    parallel.on_first(lambda: runs.refuse_another(folder, task.identity))  # one may have been in it until now
    parallel.on_first(lambda: files.sweep(folder, *runs.MADE, *runs.NOTES))
    parallel.on_first(lambda: files.sweep(folder / "checkpoints", "step-*"))
    parallel.on_first(lambda: runs.keep_changed(folder))
    model, made_of = build.compose(cfg, task.base, task.device)
    if parallel.world() == 1 and cfg.parallel.sharding in ("full", "hybrid"):
        made_of += f" (one process: parallel.sharding = '{cfg.parallel.sharding}' has nothing to shard)"
    say(first_line(task, made_of))
    for warning in data.warnings:
        say(f"warning: {warning}")
    for line in glance(data, task.tokenizer):
        say(line)
    build.fill(model, cfg, task.base, task.device)
    optimizer, optimizer_line = optim.make_optimizer(model, cfg.optim)
    if optimizer_line != cfg.optim.name:
        say(optimizer_line)

    samples = Samples(cfg, model, task.tokenizer, data.samples)
    samples.answer("before")  # the adapters have just been reset, or the weights loaded: this is the base itself
    progress = resume(folder, model, optimizer, task.stream, task.identity, say) or Progress()
    identity = written(task.identity)
    facts = {
        "identity": identity,
        "versions": versions(),
        "device": torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else "cpu",
        "data": data.counts,
        "digests": data.digests,
        "steps": task.steps,
    }
    runs.note(folder, facts, progress, "not finished")  # before all else: from here on the folder is a run's
    if parallel.is_first():
        data.write_left_out(folder / "left_out.jsonl")
        files.write_bytes(folder / "config.toml", dump(cfg).encode())

    try:
        with (
            stop.in_order(),
            run_log(task, progress) as log,
            Saver(folder, cfg.save.keep_last, identity, progress.step) as saver,
        ):
            loop(task, model, optimizer, progress, log, saver, stop)
    except (Interrupted, RunFailed) as ending:
        with suppress(RunFailed):  # the folder may have gone
            runs.note(folder, facts, progress, str(ending))
        raise
    handed_over = hand_over(task, model, progress)
    samples.answer("after")
    facts |= {
        "finished": True,
        "handed_over_step": handed_over,
        "made": parallel.of_first(lambda: runs.made(folder)),
        "samples": samples.scores,
        "seconds": round(time.time() - started, 1),
    }
    facts = runs.note(folder, facts, progress, "all steps done" if progress.step == task.steps else "early stopping")
    say(f"{facts['finish_reason']}: the {'model' if cfg.method == 'full' else 'adapter'} is in {cfg.out}")
    return facts


def loop(
    task: Task,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    log: RunLog | NoLog,
    saver: Saver,
    stop: Stop,
) -> None:
    """Step, evaluate, save, until all steps are done or nothing gets better. Raises Interrupted if `stop` asks."""
    cfg, data, steps = task.cfg, task.data, task.steps

    def judge(outcomes: list[Outcome]) -> None:
        """Look at steps that have come to an end: say which were not applied, and end the run after three in a row."""
        for outcome in outcomes:
            progress.note_step(outcome.finite)
            if outcome.finite:
                continue
            log.metrics(outcome.step, loss=outcome.loss, grad_norm=outcome.norm, skipped="not finite, not applied")
            if progress.bad_steps == BAD_STEPS:
                raise RunFailed(
                    f"the loss or the gradient was not finite at {BAD_STEPS} steps in a row, up to step "
                    f"{outcome.step}; none of them was applied, and the checkpoints in {task.folder} are from before. "
                    "Look at the data of these steps, or start anew with a lower optim.learning_rate"
                )

    def next_batches() -> list[Batch]:
        """The next step's, on their way to the device; the run's place in the data is the one before them."""
        progress.stream = task.stream.state()
        return [batch.to(task.device) for batch in task.stream.next_step()] if progress.step < steps else []

    def evaluation_is_due() -> bool:
        """Also where a run is resumed that was stopped before it, or in it."""
        due_now = progress.step == steps or due(progress.step, cfg.eval.every_steps)
        return data.eval is not None and due_now and progress.evaluated != progress.step

    outcomes, speed = Outcomes(task.device), Speed()
    model.train()
    micro_batches = next_batches()
    while True:
        # ---- after a step, or before the first of this try
        stop.look()
        better = False
        if evaluation_is_due() and not stop:
            judge(outcomes.all())
            eval_loss = evaluate(model, data.eval, cfg, task.tokenizer, task.device, stop)
            if eval_loss is not None:
                better = progress.note_evaluation(eval_loss)
                log.metrics(progress.step, eval_loss=eval_loss)
            speed.read()  # the time of an evaluation is not the steps'

        done = progress.step == steps or progress.worn_out(cfg.eval.early_stopping_patience)
        if better or done or stop or due(progress.step, cfg.save.every_steps):
            judge(outcomes.all())
            saver.save(model, optimizer, progress)
        if stop:
            saver.wait()
            raise stop.interrupted(f"after step {progress.step}, which is saved")
        if done:
            return
        saver.check()

        # ---- a step
        rate = optim.learning_rate(progress.step, steps, cfg.optim)
        optim.set_learning_rate(optimizer, rate)
        outcomes.add(progress.step + 1, *take_step(model, optimizer, micro_batches, cfg, progress.step))
        progress.step += 1
        tokens = parallel.total(sum(batch.document_tokens for batch in micro_batches))
        progress.tokens += tokens
        micro_batches = next_batches()  # while the device computes
        speed.add(tokens)
        log.tick()

        logs = progress.step in (1, steps) or progress.step % cfg.log.every_steps == 0
        judge(outcomes.all() if logs else outcomes.settled())
        if logs and outcomes.latest.finite:
            log.metrics(
                progress.step,
                loss=outcomes.latest.loss,
                learning_rate=rate,
                grad_norm=outcomes.latest.norm,
                tokens=progress.tokens,
                tokens_per_second=speed.read(),
                memory_gb=parallel.memory_gb(task.device),
            )


def hand_over(task: Task, model: Llama, progress: Progress) -> int:
    """Write the adapter or the model, of the best step by evaluation loss, else of the last; returns which."""
    parallel.on_first(lambda: lock.must_be_there(task.folder))
    step = progress.step
    if progress.best_step not in (None, step):
        best = task.folder / "checkpoints" / checkpoint.name_of(progress.best_step)
        if (damage := parallel.of_first(lambda: unfit(best, model, task.identity))) is None:
            load_trained(best, model)
            step = progress.best_step
        else:
            say(f"warning: the best checkpoint, {best.name}, is damaged ({damage}); the last weights take its place")
    if task.cfg.method == "full":
        weights = pretrained.full_state(model, DTYPES[task.cfg.model.dtype])
        parallel.by_first(weights, lambda whole: shards.save(task.folder / "model", whole, like=task.base))
    else:
        parallel.on_first(lambda: peft_format.save(task.folder / "adapter", model, task.cfg.lora, task.cfg.model))
        if limits := peft_format.vllm_limits(task.cfg.lora):
            say(limits)
    return step


def run_log(task: Task, progress: Progress) -> RunLog | NoLog:
    if not parallel.is_first():
        return NoLog()
    return RunLog(task.folder, task.steps, progress.step, task.cfg.log.tensorboard)


def make_stream(cfg: Config, corpus: Corpus, tokenizer: Tokenizer) -> Stream:
    return Stream(
        corpus,
        max_seq_len=cfg.data.max_seq_len,
        packing=cfg.data.packing,
        batch_size=cfg.train.batch_size,
        accumulation=cfg.train.gradient_accumulation_steps,
        pad_id=tokenizer.pad_id,
        seed=cfg.seed,
        rank=parallel.rank(),
        world=parallel.world(),
    )


def first_line(task: Task, made_of: str) -> str:
    """What will be trained, on how many tokens, with how much memory."""
    cfg, counts = task.cfg, task.data.counts
    return (
        f"{cfg.method} of {cfg.model.path}: {made_of}; {counts['train_documents']:,} documents, "
        f"{count(counts['tokens'])} tokens ({count(counts['trained_tokens'])} to learn) in "
        f"{counts['packed_rows']:,} rows of {cfg.data.max_seq_len}, {counts['fill']:.1%} full; "
        f"{task.steps:,} steps of {task.stream.rows_per_step} rows"
    )


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is due after `step`."""
    return every > 0 and step > 0 and step % every == 0
