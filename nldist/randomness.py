"""Every random decision by name: a function of the run's seed and of what it is for, and of nothing else.

    seed_of(seed, "train", "net0", "views", epoch)

Two decisions of different names have nothing to do with each other, and a new one changes no other. What tools leave on
disk, the order of shards and label sets, is drawn from the tool's own seed.
"""

import hashlib

# Which numbers the names of a run's decisions stand for. Raised when they become others: within an epoch a run cannot
# go on with other numbers.
REVISION = 2


def seed_of(seed: int, *name: str | int) -> int:
    """64 bits for a decision: a hash (BLAKE2b) of the seed and the name's parts."""
    text = "/".join(map(str, (seed, *name)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
