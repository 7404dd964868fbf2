"""Runs Gluon kernels in plain Python, for tests: Triton's interpreter does not know Gluon.

The source of a kernel runs with `gl` and its companions replaced by NumPy. The partitions of a
warp-specialised region run as threads, barriers block them as the hardware's do (phases
included), copies land when their barrier is told, and products read shared memory only when they
are waited for: a missing wait, a wrong phase or an early release gives a wrong answer or a
deadlock, which is reported; `deaf_barrier` provokes that. Layouts mean nothing here.
"""

import contextlib
import threading
import time
import types
from collections.abc import Callable
from unittest import mock

import numpy as np

TIMEOUT = 60.0
"""Seconds that a barrier may block before the run counts as a deadlock."""

PRODUCT_SECONDS = 0.0
"""How long a product takes."""


class Array(np.ndarray):
    """NumPy array with the methods of a Gluon tensor."""

    def to(self, dtype):
        return array(np.asarray(self).astype(dtype))

    @property
    def type(self):
        return types.SimpleNamespace(layout=None)


def array(x) -> Array:
    return np.asarray(x).view(Array)


class Pointer:
    """A flat array and offsets into it."""

    def __init__(self, base: np.ndarray, offset=0):
        self.base, self.offset = base, offset
        self.dtype = types.SimpleNamespace(element_ty=base.dtype)

    def __add__(self, offset):
        return Pointer(self.base, self.offset + np.asarray(offset, np.int64))

    def load(self, mask=None, other=0):
        offset = np.asarray(self.offset)
        if mask is None:
            return array(self.base[offset])
        mask, offset = np.broadcast_arrays(np.asarray(mask), offset)
        return array(np.where(mask, self.base[np.where(mask, offset, 0)], other))

    def store(self, value, mask=None):
        offset, value = np.broadcast_arrays(np.asarray(self.offset), np.asarray(value))
        mask = np.broadcast_to(True if mask is None else np.asarray(mask), offset.shape)
        self.base[offset[mask]] = value[mask]


class Shared:
    """A piece of shared memory, born full of NaN."""

    def __init__(self, data: np.ndarray):
        self.data, self.shape, self.dtype = data, data.shape, data.dtype

    def index(self, i):
        return Shared(self.data[int(i)])

    def permute(self, order):
        return Shared(self.data.transpose(order))

    def store(self, value):
        self.data[...] = value

    def load(self, layout):
        return array(self.data.copy())

    def slice(self, start, length):
        return Shared(self.data[start : start + length])


class Descriptor:
    """Boxes of adjacent rows of a matrix."""

    def __init__(self, matrix: np.ndarray, block_shape):
        self.matrix, self.block_shape = matrix, block_shape
        self.dtype, self.layout = matrix.dtype, None


class Product:
    """An asynchronous product: its operands are read when it is waited for, not before."""

    def __init__(self, a, b, acc, use_acc=True):
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value = None

    def finish(self):
        time.sleep(PRODUCT_SECONDS)
        left = self.a.data if isinstance(self.a, Shared) else np.asarray(self.a)
        product = left.astype(np.float32) @ self.b.data.astype(np.float32)
        self.value = array(product + np.asarray(self.acc) if self.use_acc else product)


class Barrier:
    """One mbarrier, or an array of them.

    Attributes:
        lag: seconds from the start of the copies that it counts to their landing.
    """

    lag = 0.0

    def __init__(self, count: int):
        self.all = [self] if count == 1 else [Barrier(1) for _ in range(count)]
        self.shape = (count, 1)
        self.changed = threading.Condition()
        self.expected = self.pending = self.phase = self.bytes = 0

    def index(self, i):
        return self.all[int(i)]

    def init(self, count):
        self.expected = self.pending = count

    def arrive(self, count):
        with self.changed:
            self.pending -= count
            assert self.pending >= 0, "more arrivals than the barrier expects"
            self._complete()

    def expect(self, count):
        with self.changed:
            self.bytes += count
        self.arrive(1)

    def land(self, count):
        with self.changed:
            self.bytes -= count
            self._complete()

    def _complete(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected
            self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase & 1 != parity, TIMEOUT):
                raise TimeoutError("deadlock: a barrier was never completed")


class Run:
    """One program of a kernel: the names that replace Gluon's."""

    def __init__(self, program: tuple[int, int], grid: tuple[int, int]):
        self.program, self.grid = program, grid
        self.copies = threading.local()
        self.products = threading.local()
        language = types.SimpleNamespace(
            **{name: value for name, value in vars(_Language).items() if not name.startswith("_")},
            program_id=lambda axis: array(np.int32(program[axis])),
            num_programs=lambda axis: grid[axis],
            warp_specialize=self._warp_specialize,
        )
        language.math = language
        self.names = {
            "gl": language,
            "tl": language,
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=lambda barrier, count: barrier.init(count),
                wait=lambda barrier, phase, pred=True: pred and barrier.wait(int(phase)),
                expect=lambda barrier, count: barrier.expect(count),
                arrive=lambda barrier, count=1, pred=True: pred and barrier.arrive(count),
            ),
            "copy_async": self._copy_async,
            "load_async": self._load_async,
            "async_copy": types.SimpleNamespace(mbarrier_arrive=self._copies_arrive),
            "fence_async_shared": lambda: None,
            # The threads of a partition are one here.
            "barrier": lambda: None,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait_for_products,
        }

    def function(self, jitted):
        """The Python function behind a jitted one, with the names replaced in it."""
        plain = jitted.fn
        scope = dict(plain.__globals__)
        for name, value in scope.items():
            if hasattr(value, "fn") and hasattr(value, "arg_names"):
                scope[name] = _Late(self, value)
            elif type(value).__name__ == "constexpr":
                scope[name] = value.value
        scope.update({name: x for name, x in self.names.items() if name in scope})
        scope["range"] = lambda *ends: map(array, range(*map(int, ends)))
        return types.FunctionType(plain.__code__, scope, plain.__name__, plain.__defaults__)

    def _copy_async(self, target, pointer, mask=None):
        self.copies.__dict__.setdefault("waiting", []).append((target, pointer, mask))

    @staticmethod
    def _load_async(box, corner, barrier, target):
        row, column = (int(x) for x in corner)
        rows, columns = target.shape
        assert [rows, columns] == list(box.block_shape)
        inside = box.matrix[row : row + rows, column : column + columns]

        def land():
            target.data[...] = 0  # what lies outside the matrix
            target.data[: inside.shape[0], : inside.shape[1]] = inside
            # The kernels count two bytes a number, whatever numbers are made of here.
            barrier.land(rows * columns * 2)

        _after(barrier.lag, land)

    def _copies_arrive(self, barrier, increment_count):
        assert not increment_count
        threads = self.copies.threads
        copies, self.copies.waiting = self.copies.waiting, []

        def land():
            for target, pointer, mask in copies:
                target.data[...] = pointer.load(mask)  # zeros where nothing is to be copied
            barrier.arrive(threads)

        _after(barrier.lag, land)

    def _multiply(self, a, b, acc, use_acc=True, is_async=False):
        assert is_async
        product = Product(a, b, acc, use_acc)
        self.products.__dict__.setdefault("under_way", []).append(product)
        return product

    def _wait_for_products(self, outstanding, deps):
        under_way = self.products.under_way
        while len(under_way) > outstanding:
            under_way.pop(0).finish()
        # What else is named, such as an operand in registers, is only kept alive.
        values = tuple(x.value if isinstance(x, Product) else x for x in deps)
        assert all(value is not None for value in values), "a product is used before it is there"
        return values[0] if len(values) == 1 else values

    def _warp_specialize(self, partitions, warps, registers):
        errors = []

        def run(function, args, warps):
            self.copies.threads = 32 * warps
            try:
                function(*args)
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(*partition, count))
            for partition, count in zip(partitions, (4, *warps), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def _after(seconds: float, act: Callable[[], None]) -> None:
    if seconds:
        threading.Timer(seconds, act).start()
    else:
        act()


class _Late:
    """A jitted function that is rewritten when it is called."""

    def __init__(self, run: Run, jitted):
        self.run, self.jitted = run, jitted

    def __call__(self, *args):
        return self.run.function(self.jitted)(*args)


class _Language:
    """`triton.language` and `triton.experimental.gluon.language`, as far as kernels use them."""

    int32, int64, float32 = np.int32, np.int64, np.float32
    float16, bfloat16 = np.float16, None
    static_range = range

    def constexpr(x):
        return x

    def allocate_shared_memory(dtype, shape, layout):
        if np.issubdtype(dtype, np.integer):
            return Barrier(shape[0])
        return Shared(np.full(shape, np.nan, dtype))

    def _layout(*args):
        return None

    BlockedLayout = SliceLayout = NVMMADistributedLayout = DotOperandLayout = _layout
    SwizzledSharedLayout = _layout
    NVMMASharedLayout = types.SimpleNamespace(get_default_for=_layout)

    def arange(start, end, layout):
        return array(np.arange(start, end, dtype=np.int32))

    def zeros(shape, dtype, layout):
        return array(np.zeros(shape, dtype))

    def full(shape, value, dtype, layout):
        return array(np.full(shape, value, dtype))

    def load(pointer, mask=None, other=0):
        return pointer.load(mask, other)

    def store(pointer, value, mask=None):
        pointer.store(value, mask)

    def cast(x, dtype):
        return array(x).to(dtype)

    def where(condition, x, y):
        return array(np.where(condition, x, y))

    def expand_dims(x, axis):
        return array(np.expand_dims(x, axis))

    def convert_layout(x, layout):
        return x

    def maximum(x, y):
        return array(np.maximum(x, y))

    def minimum(x, y):
        return array(np.minimum(x, y))

    def max(x, axis):
        return array(np.asarray(x).max(axis))

    def sum(x, axis):
        return array(np.asarray(x).sum(axis))

    def exp2(x):
        return array(np.exp2(x))

    def log2(x):
        return array(np.log2(x))

    def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
        assert asm.startswith("cvt.rn."), "only conversions are known, and nothing is narrow here"
        return args[0]


@contextlib.contextmanager
def deaf_barrier(place: int, *, of_copies: bool):
    """Nobody waits at the barriers that a kernel allocates as its `place`-th, and whoever should
    be waited for is slow: their copies (`of_copies`), or the products that read a place which is
    to be used again. The run must fail then."""
    allocate = _Language.allocate_shared_memory
    allocated = 0

    def allocate_deaf(dtype, shape, layout):
        nonlocal allocated
        memory = allocate(dtype, shape, layout)
        if isinstance(memory, Barrier):
            if allocated == place:
                for barrier in memory.all:
                    barrier.wait = lambda parity: None
                    barrier.lag = 0.02 if of_copies else 0.0
            allocated += 1
        return memory

    with (
        mock.patch.object(_Language, "allocate_shared_memory", allocate_deaf),
        mock.patch.dict(globals(), TIMEOUT=2.0, PRODUCT_SECONDS=0.0 if of_copies else 0.01),
    ):
        yield


class Interpreted:
    """Stands in for a kernel: float32 on the CPU instead of half precision on the GPU."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, num_warps, **constants: launch(self.kernel, grid, *args, **constants)


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """Run every program of a Gluon kernel; tensors are read and written in place."""
    grid = (*grid, 1)[:2]
    arguments = [_argument(x) for x in args]
    for y in range(grid[1]):
        for x in range(grid[0]):
            with np.errstate(all="ignore"):
                Run((x, y), grid).function(kernel)(*arguments, **constants)


def _argument(x):
    """What the kernel sees of a tensor, a tensor descriptor or a number."""
    if hasattr(x, "block_shape"):
        return Descriptor(x.base.numpy(), x.block_shape)
    return Pointer(_memory(x), x.storage_offset()) if hasattr(x, "numpy") else x


def _memory(x) -> np.ndarray:
    """Flat memory that a tensor is part of: pointers may reach its neighbours."""
    size = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((size,), (1,), 0).numpy()
