from __future__ import annotations

import platform
import resource

import numpy as np
import pytest

from mlx_distributed.comm.malloc import keep_freed_memory

NUM_BLOCKS, BLOCK_BYTES, NUM_ROUNDS = 5, 2 << 20, 20


def use_and_free() -> None:
    """As many blocks at a time as an operation has chunks under way."""
    assert all(block.all() for block in [np.ones(BLOCK_BYTES, np.uint8) for _ in range(NUM_BLOCKS)])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no such setting")
def test_freed_blocks_are_used_again_and_not_fetched_from_the_kernel() -> None:
    keep_freed_memory()
    use_and_free()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(NUM_ROUNDS):
        use_and_free()
    num_pages = NUM_ROUNDS * NUM_BLOCKS * BLOCK_BYTES // resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < num_pages / 10
