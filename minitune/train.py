"""Fine-tune a model by a recipe: the whole run, top to bottom.

Read `train` first: it prepares, loops, and hands over. What a model is made of is in build.py.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from minitune import (
    build,
    checkpoint,
    files,
    optim,
    parallel,
    peft_format,
    pretrained,
    runs,
    shards,
)
from minitune.config import Config, dump
from minitune.data import Prepared, prepare
from minitune.data.packing import Batch, Corpus, fill
from minitune.data.stream import Stream
from minitune.errors import Interrupted, RunFailed, UserError
from minitune.log import RunLog, Speed, count, say, versions
from minitune.precision import DTYPES
from minitune.samples import Samples, check_samples_fit
from minitune.step import Outcome, Outcomes, evaluate, take_step
from minitune.tokenizer import Tokenizer, load_tokenizer

BAD_STEPS = 3  # non-finite steps in a row that end a run


@dataclass
class Progress:
    """Where a run stands, next to its weights and moments; kept in each checkpoint."""

    step: int = 0  # optimizer steps behind us
    tokens: int = 0  # document tokens seen, padding left out
    bad_steps: int = 0  # non-finite ones, the last so many in a row
    best_loss: float | None = None  # nats per token on the evaluation data
    best_step: int | None = None
    evals_without_better: int = 0
    stream: dict[str, Any] = field(default_factory=dict)  # the data cursor

    def note_evaluation(self, loss: float) -> bool:
        """Remember an evaluation; whether it is the best so far."""
        better = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if better:
            self.best_loss, self.best_step, self.evals_without_better = loss, self.step, 0
        else:
            self.evals_without_better += 1
        return better

    def worn_out(self, patience: int) -> bool:
        """Whether the last `patience` evaluations (0: no limit) brought nothing better."""
        return 0 < patience <= self.evals_without_better


def train(cfg: Config) -> dict[str, Any]:
    """Run a recipe to its end, from its newest checkpoint if there is one; returns what run.json holds.

    Raises:
        UserError: the recipe, the data or the model folder is wrong (before the model loads, where it can be known).
        Interrupted: SIGTERM or SIGINT came; a checkpoint was written.
        RunFailed: three steps in a row had no finite loss or gradient.
    """
    started = time.time()
    device = parallel.start(cfg.train.deterministic)
    run = Path(cfg.out).resolve()
    if run.exists() and not run.is_dir():
        raise UserError(f"out: {run} is a file; name a folder for the run")
    base = pretrained.find(cfg.model.path, cfg.model.revision)
    if Path(cfg.model.path).is_dir():  # what is written down must be found from any folder
        cfg = replace(cfg, model=replace(cfg.model, path=str(base.resolve())))
    tokenizer = load_tokenizer(base)
    config = pretrained.read_config(base)
    pretrained.check_fits(config, cfg.data.max_seq_len, tokenizer.vocab_size)
    data = prepare(cfg.data, tokenizer, cfg.eval.samples)
    check_samples_fit(cfg, data.samples, config)
    stream = make_stream(cfg, data.train, tokenizer)
    data.counts.update(
        packed_rows=stream.rows_per_epoch,
        fill=round(fill(data.train.lengths, stream.rows_per_epoch, cfg.data.max_seq_len), 4),
    )
    steps = cfg.train.max_steps or cfg.train.num_epochs * stream.steps_per_epoch

    identity = checkpoint.identity(cfg, pretrained.fingerprint(base), data.digests)
    identity["steps"] = steps  # the learning rate of every step depends on it
    if cfg.train.resume == "never":
        runs.set_aside(run)
    elif (finished := runs.finished(run)) is not None:
        checkpoint.check_identity(run / "run.json", finished["identity"], identity)
        say(f"{run} is finished ({finished['finish_reason']} at step {finished['step']}); nothing to do")
        return finished

    files.make_folder(run)
    model, made_of = build.compose(cfg, base, device)
    if cfg.parallel.sharding in ("full", "hybrid"):
        made_of += f" (one process: parallel.sharding = '{cfg.parallel.sharding}' has nothing to shard)"
    say(first_line(cfg, data, stream, steps, made_of))
    for warning in data.warnings:
        say(f"warning: {warning}")
    build.fill(model, cfg, base, device)
    optimizer, optimizer_line = optim.make_optimizer(model, cfg.optim)
    if optimizer_line != cfg.optim.name:
        say(optimizer_line)

    progress = Progress()
    samples = Samples(cfg, model, tokenizer, data.samples)
    newest = checkpoint.newest(run, identity, say)
    samples.answer("before")  # the adapters have just been reset, or the weights loaded: this is the base itself
    if newest:
        state = checkpoint.load(newest, model, optimizer)
        progress = Progress(**state["progress"])
        stream.load(progress.stream)
        say(f"going on from {newest.name}")
    facts = {
        "identity": identity,
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "data": data.counts,
        "digests": data.digests,
        "steps": steps,
    }
    data.write_left_out(run / "left_out.jsonl")
    files.write_text(run / "config.toml", dump(cfg))
    note_ending(run, facts, progress, "not finished")

    # ---- the loop ----------------------------------------------------------------------------------------------

    def save() -> None:
        try:
            checkpoint.save(run, progress.step, model, optimizer, {"identity": identity, "progress": vars(progress)})
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"checkpoint {progress.step} could not be written ({error}); those before it are whole. Make room, "
                "then run again to go on"
            ) from None
        checkpoint.rotate(run, cfg.save.keep_last, progress.best_step)

    def judge(outcomes: list[Outcome]) -> None:
        """Look at steps that have come to an end: say which were not applied, and end the run after three in a row."""
        for outcome in outcomes:
            progress.bad_steps = 0 if outcome.finite else progress.bad_steps + 1
            if outcome.finite:
                continue
            log.metrics(outcome.step, loss=outcome.loss, grad_norm=outcome.norm, skipped="not finite, not applied")
            if progress.bad_steps == BAD_STEPS:
                note_ending(run, facts, progress, f"no finite loss or gradient at {BAD_STEPS} steps in a row")
                raise RunFailed(
                    f"the loss or the gradient was not finite at {BAD_STEPS} steps in a row, up to step "
                    f"{outcome.step}; none of them was applied, and the checkpoints in {run} are from before. "
                    "Lower optim.learning_rate, or look at the data of these steps."
                )

    def next_batches() -> list[Batch]:
        """The next step's, on their way to the device; the run's place in the data is the one before them."""
        progress.stream = stream.state()
        return [batch.to(device) for batch in stream.next_step()] if progress.step < steps else []

    outcomes = Outcomes(device)
    speed = Speed()
    model.train()
    with RunLog(run, steps, progress.step, cfg.log.tensorboard) as log, stop_signals() as stop:
        micro_batches = next_batches()
        while progress.step < steps and not progress.worn_out(cfg.eval.early_stopping_patience):
            rate = optim.learning_rate(progress.step, steps, cfg.optim)
            optim.set_learning_rate(optimizer, rate)
            outcomes.add(progress.step + 1, *take_step(model, optimizer, micro_batches, cfg, progress.step))

            progress.step += 1
            tokens = sum(batch.document_tokens for batch in micro_batches)
            progress.tokens += tokens
            micro_batches = next_batches()  # while the device computes
            speed.add(tokens)
            log.tick()

            last, stopped_by = progress.step == steps, stop.signum
            logs = last or progress.step == 1 or progress.step % cfg.log.every_steps == 0
            evaluates = data.eval is not None and (last or due(progress.step, cfg.eval.every_steps))
            saves = last or stopped_by or due(progress.step, cfg.save.every_steps)
            judge(outcomes.all() if logs or evaluates or saves else outcomes.settled())
            if logs and outcomes.latest.finite:
                log.metrics(
                    progress.step,
                    loss=outcomes.latest.loss,
                    learning_rate=rate,
                    grad_norm=outcomes.latest.norm,
                    tokens=progress.tokens,
                    tokens_per_second=speed.read(),
                    memory_gb=parallel.memory_gb(device),
                )

            better = False
            if evaluates:
                eval_loss = evaluate(model, data.eval, cfg, tokenizer, device)
                log.metrics(progress.step, eval_loss=eval_loss)
                better = progress.note_evaluation(eval_loss)
                speed.read()  # the time of an evaluation is not the steps'

            if (last and cfg.save.every_steps) or better or stopped_by or due(progress.step, cfg.save.every_steps):
                save()
            if stopped_by and not last:
                name = signal.Signals(stopped_by).name
                note_ending(run, facts, progress, f"stopped by {name}")
                raise Interrupted(stopped_by, f"{name}: stopped after step {progress.step}, saved; run again to go on")

    # ---- hand over ---------------------------------------------------------------------------------------------

    handed_over = progress.step
    if progress.best_step not in (None, progress.step):
        best = run / "checkpoints" / checkpoint.name_of(progress.best_step)
        if damage := checkpoint.damaged(best):
            say(f"warning: the best checkpoint, {best.name}, is damaged ({damage}); the last weights take its place")
        else:
            checkpoint.load_trained(best, model)
            handed_over = progress.best_step
    if cfg.method == "full":
        shards.save(run / "model", pretrained.full_state(model, DTYPES[cfg.model.dtype]), like=base)
    else:
        peft_format.save(run / "adapter", model, cfg.lora, cfg.model)
    samples.answer("after")
    facts |= {
        "finished": True,
        "handed_over_step": handed_over,
        "samples": samples.scores,
        "seconds": round(time.time() - started, 1),
    }
    facts = note_ending(run, facts, progress, "all steps done" if progress.step == steps else "early stopping")
    say(f"{facts['finish_reason']}: the {'model' if cfg.method == 'full' else 'adapter'} is in {cfg.out}")
    return facts


def note_ending(run: Path, facts: dict[str, Any], progress: Progress, reason: str) -> dict[str, Any]:
    """Write run.json: what is known of the run, how far it came, and how it ended."""
    how_far = {"step": progress.step, "tokens": progress.tokens}
    best = {"best_step": progress.best_step, "best_eval_loss": progress.best_loss}
    whole = {**facts, **how_far, **best, "finish_reason": reason}
    files.write_json(run / "run.json", whole)
    return whole


@dataclass
class Stop:
    """Which signal asked the run to stop; 0 while none has."""

    signum: int = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within the block the first SIGTERM or SIGINT is noted, for the loop to stop in order; a second acts at once."""
    stop = Stop()

    def note(signum: int, frame: object) -> None:
        stop.signum = signum
        signal.signal(signum, before[signum])

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield stop
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    for signum in before:
        signal.signal(signum, note)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def make_stream(cfg: Config, corpus: Corpus, tokenizer: Tokenizer) -> Stream:
    return Stream(
        corpus,
        max_seq_len=cfg.data.max_seq_len,
        packing=cfg.data.packing,
        batch_size=cfg.train.batch_size,
        accumulation=cfg.train.gradient_accumulation_steps,
        pad_id=tokenizer.pad_id,
        seed=cfg.seed,
    )


def first_line(cfg: Config, data: Prepared, stream: Stream, steps: int, made_of: str) -> str:
    """What will be trained, on how many tokens, with how much memory."""
    counts = data.counts
    return (
        f"{cfg.method} of {cfg.model.path}: {made_of}; {counts['train_documents']:,} documents, "
        f"{count(counts['tokens'])} tokens ({count(counts['trained_tokens'])} to learn) in "
        f"{counts['packed_rows']:,} rows of {cfg.data.max_seq_len}, {counts['fill']:.1%} full; "
        f"{steps:,} steps of {stream.rows_per_step} rows"
    )


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0
