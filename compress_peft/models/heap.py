"""The C library's heap: what a process has freed, it may keep from the system for good."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; no symbols of the process itself (Windows)
        return None


def trim_heap() -> None:
    """Give the free pages back (glibc; nothing elsewhere): the holes that tensors of many sizes leave add up to more
    than a hundred megabytes in a walk over the blocks of a small model."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
