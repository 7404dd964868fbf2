"""Cases of `test_launch`, on Triton's own launchers above a driver that writes launches down.

Run with the path of the driver (see `cuda_stub.c`); prints what became of each case as JSON.
Tensors are on the CPU, and stand for ones on a GPU.
"""

import contextlib
import ctypes
import gc
import json
import os
import struct
import sys
import threading
import traceback
import weakref
from pathlib import Path
from typing import NamedTuple
from unittest import mock

STUB = Path(sys.argv[1])
os.environ["TRITON_LIBCUDA_PATH"] = str(STUB.parent)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
stub = ctypes.CDLL(str(STUB), mode=ctypes.RTLD_GLOBAL)
stub.stub_written.restype = ctypes.c_void_p
stub.stub_length.restype = ctypes.c_size_t

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402

from psa_torch._triton import launch as module  # noqa: E402
from psa_torch._triton.boxes import row_boxes  # noqa: E402
from psa_torch._triton.launch import Distance, launch_kernel  # noqa: E402
from psa_torch._triton.recording import Plan  # noqa: E402

STREAM = 7
torch.cuda.get_device_capability = lambda device=None: (9, 0)
driver = CudaDriver()
driver.get_current_device = lambda: -1  # what a tensor on the CPU says of its device
driver.get_current_stream = lambda device: STREAM
driver.get_device_capability = lambda device=None: (9, 0)
triton.runtime.driver.set_active(driver)


@triton.jit(do_not_specialize=["apart"])
def scale_kernel(X, EXTRA, ROOM, OUT, n, one, factor, apart, SIZES: tl.constexpr):
    at = tl.arange(0, SIZES[0])
    x = tl.load(X + at, mask=at < n) * factor + one + apart
    if EXTRA is not None:
        x += tl.load(EXTRA + at)
    tl.store(ROOM + at, x)
    tl.store(OUT + at, x)


PARAMETERS = {"X": "P", "ROOM": "P", "OUT": "P", "n": "i", "factor": "f", "apart": "i"}
"""Run-time parameters of `scale_kernel` without EXTRA, as `struct` reads them."""


@gluon.jit
def box_kernel(box, X, n):
    gl.store(X + n, box.block_shape[0])


class Launched(NamedTuple):
    grid: tuple
    threads: int
    stream: int
    function: int
    values: dict


@contextlib.contextmanager
def launches(parameters=None):
    """A list that holds the launches made inside, once it is left."""
    parameters = parameters or PARAMETERS
    sizes = [
        int(kind[:-1]) if kind.endswith("s") else struct.calcsize(kind)
        for kind in parameters.values()
    ]
    stub.stub_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    found = []
    yield found
    layout = "=3IIQQ" + "".join(kind.replace("P", "Q") for kind in parameters.values())
    data = ctypes.string_at(stub.stub_written(), stub.stub_length())
    stub.stub_expect(0, None)  # other kernels have other parameters
    for x, y, z, threads, stream, function, *values in struct.iter_unpack(layout, data):
        values = dict(zip(parameters, values, strict=True))
        found.append(Launched((x, y, z), threads, stream, function, values))


def tensor(size=64, offset=0, dtype=torch.float32):
    """At `offset` bytes after a multiple of 512, with room before and after."""
    memory = torch.zeros(size * dtype.itemsize + 2048, dtype=torch.uint8)
    start = -memory.data_ptr() % 512 + offset
    return memory[start : start + size * dtype.itemsize].view(dtype)


def function(x, n, factor, unit=4, room=64):
    """Two launches with memory of their own between them."""
    first = x.new_empty(2, room)
    out = torch.empty(room)
    apart = Distance(x, first, unit, 2**30)
    for target in (first[1], out):
        launch_kernel(
            scale_kernel,
            (3, 2),
            x,
            None,
            first[1],
            target,
            n,
            1,
            factor,
            apart,
            SIZES=(64,),
            num_warps=2,
        )
    return out, None


class Calls:
    """`repeat` for one function, counting how often the function itself runs."""

    def __init__(self, function=function):
        self.plans, self.runs, self.function = {}, 0, function

    def __call__(self, *args, **kwargs):
        def counted(*args, **kwargs):
            self.runs += 1
            return self.function(*args, **kwargs)

        return module.repeat(counted, self.plans, args, kwargs)


def recorded(*args, **kwargs):
    calls = Calls()
    calls(*args, **kwargs)
    calls(*args, **kwargs)
    assert calls.runs == 2
    assert [type(x) for x in calls.plans.values()] == [Plan]
    return calls


def check(found, x, out, n, factor, stream=STREAM):
    """Both launches of `function` are as they would be without a recording."""
    with launches() as want:
        function(x, n, factor)
    assert len(found) == len(want) == 2
    room = found[0].values["ROOM"]
    assert (room - 256) % 64 == 0
    for got, like, target in zip(found, want, (room, out.data_ptr()), strict=True):
        assert got[:2] == like[:2] == ((3, 2, 1), 64)
        assert got.stream == stream
        assert got.function == like.function
        values = {"X": x.data_ptr(), "ROOM": room, "OUT": target, "n": n, "factor": factor}
        values["apart"] = (room - 256 - x.data_ptr()) // 4
        assert got.values == values, (got.values, values)


def case_other_memory():
    calls = recorded(tensor(), 50, 2.5)
    for _ in range(3):
        x = tensor()
        with launches() as found:
            out, nothing = calls(x, 50, 2.5)
        assert calls.runs == 2 and nothing is None
        assert (out.shape, out.dtype) == ((64,), torch.float32)
        check(found, x, out, 50, 2.5)


def case_other_numbers():
    calls = recorded(tensor(), 50, 2.5)
    for n, factor in ((48, 2.5), (1, 2.5), (50, 3.0), (2**40, 2.5)):
        runs = calls.runs
        x = tensor()
        calls(x, n, factor)
        calls(x, n, factor)
        assert calls.runs == runs + 2  # not mistaken for the first
        if n < 2**31 and n != 1:  # else it is no parameter, or one of another size
            with launches() as found:
                out, _ = calls(x, n, factor)
            assert calls.runs == runs + 2
            check(found, x, out, n, factor)


def case_other_types():
    calls = recorded(tensor(), 50, 2.0)
    for value in (2, True):  # equal to it or not, they are compiled for another type
        runs = calls.runs
        calls(tensor(), 50, value)
        assert calls.runs == runs + 1


def case_other_alignment():
    calls = recorded(tensor(), 50, 2.5)
    functions = set()
    for offset in (0, 4, 16, 64, 68):
        x = tensor(offset=offset)
        for _ in range(2):
            calls(x, 50, 2.5)
        runs = calls.runs
        x = tensor(offset=offset)
        with launches() as found:
            out, _ = calls(x, 50, 2.5)
        assert calls.runs == runs
        check(found, x, out, 50, 2.5)
        functions.add(found[0].function)
    assert len(functions) == 2  # for multiples of 16 and others


def case_other_shape_and_strides():
    calls = recorded(tensor(), 50, 2.5)
    wide = tensor(128)
    for x in (tensor(65), wide[::2], tensor().view(8, 8), tensor(dtype=torch.int32)):
        runs = calls.runs
        calls(x, 50, 2.5)
        assert calls.runs == runs + 1


def case_distance_that_is_none():
    calls = Calls(lambda x: function(x, 50, 2.5, unit=512))
    near = tensor()
    calls(near)
    calls(near)
    (plan,) = calls.plans.values()
    between = plan._distances[0]
    assert between.of([0, 512, 1024]) == 2 and between.of([1024, 0, 512]) == -1
    assert between.of([0, 0, 514]) is None and between.of([0, 0, 2**39]) is None
    seen = []

    def far(x):
        seen.append(module.recording.is_far)
        out = torch.empty(64)
        launch_kernel(scale_kernel, (3, 2), x, None, out, out, 50, 1, 2.5, 0, SIZES=(64,))
        return out, None

    calls.function = far
    with mock.patch.object(type(between), "of", lambda *_: None):
        for _ in range(4):
            x, runs = tensor(), calls.runs
            with launches() as found:
                out, _ = calls(x)
            assert found[0].values["X"] == x.data_ptr()
            assert [x.values["OUT"] for x in found] == [out.data_ptr()]
    assert seen == [True] and calls.runs == runs  # recorded once more, then repeated
    with mock.patch.object(type(between), "of", lambda *_: 3), launches() as found:
        calls(tensor())
    assert [x.values["apart"] for x in found] == [3, 3] and seen == [True]  # near again
    assert not module.recording.is_far


def case_descriptors():
    parameters = {"box": "128s", "shape0": "i", "shape1": "i", "stride0": "q", "stride1": "q"}
    parameters |= {"X": "P", "n": "i"}

    def boxed(x, n):
        out = torch.empty(4, dtype=torch.int32)
        room = x.new_empty(1, 1, 256, 64)
        for rows in (x, room):
            launch_kernel(box_kernel, (1,), row_boxes(rows, 128, 64), out, n, num_warps=4)
        return out

    def draw():
        return tensor(256 * 64, dtype=torch.bfloat16).view(1, 1, 256, 64)

    calls = Calls(boxed)
    for _ in range(2):
        calls(draw(), 3)
    assert [type(x) for x in calls.plans.values()] == [Plan]
    kept = [draw() for _ in range(5)]
    for x in (*kept, *kept):
        with launches(parameters) as found:
            out = calls(x, 3)
        with launches(parameters) as want:
            boxed(x, 3)
        assert calls.runs == 2 and len(found) == len(want) == 2
        for got, like in zip(found, want, strict=True):
            address = struct.unpack("=Q", got.values["box"][:8])
            assert address[0] % 512 == 0 or got is found[1]
            assert got.values["box"][8:] == like.values["box"][8:]
            assert got.function == like.function and got.values["X"] == out.data_ptr()
            same = ("shape0", "shape1", "stride0", "stride1", "n")
            assert all(got.values[name] == like.values[name] for name in same)
        assert struct.unpack("=Q", found[0].values["box"][:8]) == (x.data_ptr(),)
        assert found[1].values["box"] != found[0].values["box"]


def case_hooks_see_every_launch():
    calls = recorded(tensor(), 50, 2.5)
    seen = []
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        hook.add(seen.append)
        runs = calls.runs
        calls(tensor(), 50, 2.5)
        hook.remove(seen.append)
        assert calls.runs == runs + 1
    assert [x.get()["name"] for x in seen] == ["scale_kernel"] * 4
    calls(tensor(), 50, 2.5)
    assert calls.runs == runs + 1


def case_streams():
    calls = recorded(tensor(), 50, 2.5)
    for stream in (0, 11, 2**40):
        x = tensor()
        with mock.patch.object(driver, "get_current_stream", lambda device, s=stream: s):
            with launches() as found:
                out, _ = calls(x, 50, 2.5)
        check(found, x, out, 50, 2.5, stream)


def case_another_device_is_current():
    calls = recorded(tensor(), 50, 2.5)
    entered = []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        with mock.patch.object(driver, "get_current_stream", lambda _: 13):
            yield

    x = tensor()
    with mock.patch.object(driver, "get_current_device", lambda: 3):
        with mock.patch.object(torch.cuda, "device", device), launches() as found:
            out, _ = calls(x, 50, 2.5)
    assert entered == [-1]
    check(found, x, out, 50, 2.5, 13)


def case_more_than_launches_is_never_repeated():
    outside = tensor()

    def copies(x):
        return function(x.clone(), 50, 2.5)

    def reads_others(x):
        launch_kernel(scale_kernel, (1,), x, None, outside, outside, 5, 1, 1.0, 2, SIZES=(64,))

    def returns_a_part(x):
        out, _ = function(x, 50, 2.5)
        return out[1:]

    def returns_its_input(x):
        function(x, 50, 2.5)
        return x

    def fills(x):
        out, _ = function(x, 50, 2.5)
        return out.fill_(3.0)

    def launches_past_it(x):
        out, _ = function(x, 50, 2.5)
        scale_kernel[(1,)](x, None, out, out, 5, 1, 1.0, 2, SIZES=(64,))
        return out

    bodies = copies, reads_others, returns_a_part, returns_its_input, fills, launches_past_it
    for body in bodies:
        calls = Calls(body)
        for _ in range(4):
            calls(tensor())
        assert calls.runs == 4, body.__name__
        assert not any(type(x) is Plan for x in calls.plans.values()), body.__name__


def case_specialised_distances_are_refused():
    @triton.jit
    def plain(X, apart, N: tl.constexpr):
        tl.store(X + tl.arange(0, N), apart)

    def body(x):
        out = torch.empty(64)
        launch_kernel(plain, (1,), out, Distance(x, out, 4, 2**30), N=64)
        return out

    calls = Calls(body)
    for _ in range(3):
        calls(tensor())
    assert calls.runs == 3


def case_one_tensor_twice():
    def pair(x, y):
        out = torch.empty(64)
        launch_kernel(scale_kernel, (1,), x, None, y, out, 50, 3, 1.0, 2, SIZES=(64,))
        return out

    parameters = {**dict.fromkeys(("X", "ROOM", "OUT"), "P"), "n": "i", "one": "i"}
    parameters |= {"factor": "f", "apart": "i"}
    calls = Calls(pair)
    same = tensor()
    for _ in range(3):
        calls(same, same)
    assert calls.runs == 3
    for _ in range(3):
        x, y = tensor(), tensor()
        with launches(parameters) as found:
            calls(x, y)
        values = found[0].values
        assert (values["X"], values["ROOM"]) == (x.data_ptr(), y.data_ptr())
    assert calls.runs == 5
    calls(same, same)
    assert calls.runs == 6


def case_nothing_is_kept_alive():
    calls = recorded(tensor(), 50, 2.5)
    x = tensor()
    out, _ = calls(x, 50, 2.5)
    found = [weakref.ref(x), weakref.ref(out)]
    del x, out
    gc.collect()
    assert [ref() for ref in found] == [None, None]


def case_results_are_of_their_own():
    calls = recorded(tensor(), 50, 2.5)
    results = [calls(tensor(), 50, 2.5)[0] for _ in range(4)]
    assert len({x.data_ptr() for x in results}) == 4


def case_modes_see_the_operators():
    calls = recorded(tensor(), 50, 2.5)

    def plain(x, n, factor):
        return "plain"

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            return operator(*args, **(kwargs or {}))

    calls.function = plain
    x = tensor()
    with Looks():
        assert calls(x, 50, 2.5) == "plain"
    with FakeTensorMode() as mode:
        assert calls(mode.from_tensor(x), 50, 2.5) == "plain"
    assert calls(torch.nn.Parameter(tensor()), 50, 2.5) == "plain"
    assert calls(tensor(), 50, 2.5) != "plain"


def case_an_error_is_not_recorded():
    def fails(x):
        function(x, 50, 2.5)
        raise ValueError("no")

    calls = Calls(fails)
    for _ in range(3):
        with contextlib.suppress(ValueError):
            calls(tensor())
    assert calls.runs == 3
    assert module.recording.recorder is None
    recorded(tensor(), 50, 2.5)


def call_from_threads(calls):
    failures, start = [], threading.Barrier(4)

    def work():
        try:
            start.wait()
            for _ in range(50):
                x = tensor()
                out, _ = calls(x, 50, 2.5)
                assert out.data_ptr() != x.data_ptr()
        except Exception:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def case_threads_that_repeat():
    calls = recorded(tensor(), 50, 2.5)
    call_from_threads(calls)
    assert calls.runs == 2


def case_threads_that_record():
    calls = Calls()
    call_from_threads(calls)
    assert [type(x) for x in calls.plans.values()] == [Plan]
    runs, x = calls.runs, tensor()
    with launches() as found:
        out, _ = calls(x, 50, 2.5)
    assert calls.runs == runs
    check(found, x, out, 50, 2.5)


def case_memory_of_plans_is_bounded():
    calls = Calls()
    with mock.patch.object(module, "MAX_CALLS", 8):
        for n in range(100, 130):
            calls(tensor(), n, 2.5)
    assert len(calls.plans) <= 8


def main() -> None:
    report = {}
    for name, case in list(globals().items()):
        if name.startswith("case_"):
            try:
                case()
                report[name] = ""
            except Exception:
                report[name] = traceback.format_exc()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
