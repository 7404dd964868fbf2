"""Gluon functions that were renamed between Triton 3.6 and 3.9: nothing else knows of versions."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Copies from addresses, one for each thread's piece, into shared memory."""

load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
"""Copies a box of a tensor into shared memory."""

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Waits for all threads of the partition."""
