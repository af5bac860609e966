"""One seed for a run; everything random in it draws from a seed of its own, derived by name.

So nothing random depends on what ran before it: a resumed run needs no generator state, and evaluating or
logging more often cannot change training.
"""

import hashlib


def derive(seed: int, *names: object) -> int:
    """A seed in [0, 2^63) for one use, e.g. derive(42, "dropout", step, micro_batch)."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
