"""A few threads that work on one recorded step each, with their results in order."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from ..errors import FiberPOWarning

WORKERS = 2
"""Steps that are worked on at a time (and held in memory, with one that is being read)."""

Result = TypeVar("Result")


def in_order(
    items: Iterator[Any], work: Callable[[Any], Result], workers: int = WORKERS
) -> Iterator[Result]:
    """``work(item)`` of every item, in order, on ``workers`` threads.

    torch uses one thread in each of them meanwhile, and `FiberPOWarning` is not shown.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Result]] = deque()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FiberPOWarning)
            for item in items:
                waiting.append(pool.submit(work, item))
                del item
                if len(waiting) >= workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
