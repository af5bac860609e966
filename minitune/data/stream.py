"""The order in which a run meets its data: an endless stream of optimizer steps, resumable at each of them.

An epoch is packed and shuffled anew by a seed drawn from (seed, epoch), so where a run stands is two numbers:
the epoch and the step in it. A step is a slice of the epoch's rows; its rows are dealt to the ranks in turn.
So the rows of a step, and with them its gradient, do not depend on how many ranks share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minitune.data.packing import Batch, Corpus, Rows, collate, rows
from minitune.errors import UserError
from minitune.seeds import derive


class Stream:
    """Optimizer steps over a corpus, epoch after epoch, as one rank sees them.

    Every epoch has `steps_per_epoch` steps. The last takes the rows that are left: it may have fewer
    micro-batches, but no row is dropped or moved to the next epoch. In each step all ranks get equally many
    micro-batches, each of `batch_size` rows, with rows of padding where the data runs out.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        max_seq_len: int,
        packing: bool,
        batch_size: int,
        accumulation: int,
        pad_id: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(corpus) == 0:
            raise UserError("data.train: no documents are left to train on")
        self.corpus = corpus
        self.max_seq_len = max_seq_len
        self.packing = packing
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.rank = rank
        self.world = world
        self.rows_per_step = batch_size * accumulation * world
        self.epoch = 0  # of the next step
        self.step = 0  # of the next step, in its epoch
        self._shuffled = (0, self._shuffle(0))
        self.rows_per_epoch = len(self._shuffled[1])
        self.steps_per_epoch = -(-self.rows_per_epoch // self.rows_per_step)

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""
        step_rows = self.rows_of_step(self.epoch, self.step)
        self.step += 1
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
        width = self.max_seq_len if self.packing else None
        micro_batches = deal(step_rows, self.batch_size, self.rank, self.world)
        return [collate(self.corpus, batch, width, self.pad_id) for batch in micro_batches]

    def rows_of_step(self, epoch: int, step: int) -> list[list[int]]:
        """The rows, as document numbers, that all ranks together take in one step."""
        if self._shuffled[0] != epoch:
            self._shuffled = (epoch, self._shuffle(epoch))
        start = step * self.rows_per_step
        return self._shuffled[1][start : start + self.rows_per_step]

    def _shuffle(self, epoch: int) -> Rows:
        return rows(self.corpus.lengths, self.max_seq_len, derive(self.seed, "epoch", epoch), self.packing)

    def state(self) -> dict[str, int | bool | str]:
        """Where the stream stands and over what, for JSON."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def state_at(self, steps: int) -> dict[str, int | bool | str]:
        """What `state` says after so many steps from the beginning."""
        epoch, step = divmod(steps, self.steps_per_epoch)
        return {"epoch": epoch, "step": step, **self._identity()}

    def load(self, state: dict[str, int | bool | str]) -> None:
        """Go on where `state` was taken; refuse one over other data, or that cuts the data into other steps.

        The number of ranks may differ, and batch_size and accumulation with it, as long as a step takes as
        many rows as before.
        """
        changes = [
            f"{name} was {state.get(name, 'not written down')} and is {now}"
            for name, now in self._identity().items()
            if state.get(name) != now
        ]
        if changes:
            raise UserError(
                f"cannot resume, the checkpoint was made with other data or settings: {'; '.join(changes)}; "
                "put them back (rows_per_step is batch_size x gradient_accumulation_steps x processes), or "
                "start afresh with train.resume = 'never' and another out"
            )
        epoch, step = state.get("epoch"), state.get("step")
        if type(epoch) is not int or epoch < 0:
            raise UserError(f"cannot resume, the checkpoint's data state is damaged: epoch is {epoch!r}")
        if type(step) is not int or not 0 <= step < self.steps_per_epoch:
            raise UserError(f"cannot resume, the checkpoint's data state is damaged: step is {step!r}")
        self.epoch, self.step = epoch, step

    def _identity(self) -> dict[str, int | bool | str]:
        """Everything that decides which rows a step takes."""
        return {
            "documents": len(self.corpus),
            "tokens": self.corpus.tokens,
            "digest": self.corpus.digest,
            "max_seq_len": self.max_seq_len,
            "packing": self.packing,
            "seed": self.seed,
            "rows_per_epoch": self.rows_per_epoch,
            "rows_per_step": self.rows_per_step,
        }


def eval_batches(
    corpus: Corpus,
    *,
    max_seq_len: int,
    packing: bool,
    batch_size: int,
    pad_id: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """This rank's batches of a corpus to evaluate on: the same ones, in the same order, every time."""
    width = max_seq_len if packing else None
    for batch in deal(rows(corpus.lengths, max_seq_len, 0, packing), batch_size, rank, world):
        yield collate(corpus, batch, width, pad_id)


def deal(all_rows: Sequence[list[int]], batch_size: int, rank: int, world: int) -> Iterator[list[list[int]]]:
    """One rank's share of the rows, dealt in turn, in batches of exactly `batch_size`.

    Empty rows fill up, so that all ranks do the same work and the compiled shapes stay the same.
    """
    mine = range(rank, len(all_rows), world)
    for batch in range(-(-len(all_rows) // (batch_size * world))):
        rows_of_batch = [all_rows[row] for row in mine[batch * batch_size : (batch + 1) * batch_size]]
        yield rows_of_batch + [[]] * (batch_size - len(rows_of_batch))
