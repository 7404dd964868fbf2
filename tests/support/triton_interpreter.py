"""Mends to Triton's interpreter, which the kernel tests rely on.

- bfloat16 lives in the interpreter as raw 16-bit patterns, and `tl.dot` multiplies those
  patterns as if they were integers, without a word: operands are widened to float32 first.
- The interpreter of Triton 3.6 turns arrays of one element into scalars in a way that
  NumPy 2.4 refuses: say so instead of failing in the middle of a kernel.
- Half of its time goes to overflow checks of small integers and to patching `triton.language`
  again at every call of a device function: both are left out.
"""

import dataclasses

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

_plain_call = interpreter.InterpretedFunction.__call__
_plain_dot = interpreter.InterpreterBuilder.create_dot


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def mend() -> None:
    """Mend the interpreter of this process; calling it again changes nothing.

    Raises:
        RuntimeError: this pair of Triton and NumPy cannot interpret kernels.
    """
    if version(triton.__version__) < (3, 9) and version(np.__version__) >= (2, 4):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} needs numpy below 2.4, "
            f"found {np.__version__}: run these tests on a GPU or with another numpy"
        )
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpretedFunction.__call__ = _call_device_function
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _widened(operand):
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _dot(builder, a, b, *args, **kwargs):
    return _plain_dot(builder, _widened(a), _widened(b), *args, **kwargs)


def _call_device_function(function, *args, **kwargs):
    if not function.fn.__module__.startswith("psa_torch."):
        return _plain_call(function, *args, **kwargs)
    # The kernel that calls it is running, so the language is patched already.
    return function.rewrite()(*args, **kwargs)
