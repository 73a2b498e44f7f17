"""The threads that compiled CPU kernels run on.

They are our own and not Numba's: they cost nothing until used, follow `torch.get_num_threads()`, may be entered from
several Python threads at once and survive a fork, none of which holds for every threading layer of Numba.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None  # a forked child has the object but not the threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def on_threads(work: Callable[[], None], num_tasks: int) -> None:
    """Call `work` on as many threads as torch uses, the calling one included, and wait for all of them.

    Args:
        work: a function that takes tasks from a common counter until none is left, and that releases the GIL.
        num_tasks: the number of tasks; no more threads than that are used.
    """
    global _pool
    helpers = min(torch.get_num_threads(), num_tasks) - 1
    if helpers > 0 and _pool is None:
        _pool = ThreadPoolExecutor(max(os.cpu_count() or 1, 1), "tenfold")
    futures = [_pool.submit(work) for _ in range(helpers)]
    work()
    for future in futures:
        future.result()
