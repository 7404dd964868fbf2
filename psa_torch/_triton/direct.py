"""A compiled kernel, launched past Triton's argument binder: by the C function below it.

What that function takes changed between Triton 3.6 and 3.9: nothing else knows of it.
"""

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

MAX_DESCRIPTORS = 1024
"""Descriptors that are kept for one argument of a launch, one for each address."""

_ARGUMENTS = ("gridX", "gridY", "gridZ", "stream", "function")
_STREAM = 3


class Address(NamedTuple):
    """Where an argument points: `offset` bytes from the start of a piece of memory.

    Attributes:
        piece: number of the piece among those of the call.
    """

    piece: int
    offset: int


class Distance(int):
    """Whole units of memory from the start of one tensor to that of another: an argument of a
    kernel that every call computes anew.

    Attributes:
        start, end: the tensors; the same for `Address` once a launch is recorded.
        unit: bytes.
        limit: distances at or past it are not for the kernel.
    """

    def __new__(cls, start: Tensor, end: Tensor, unit: int, limit: int):
        self = super().__new__(cls, (end.data_ptr() - start.data_ptr()) // unit)
        self.start, self.end, self.unit, self.limit = start, end, unit, limit
        return self


class Between(NamedTuple):
    """A `Distance` of which the places are known, not the memory."""

    start: Address
    end: Address
    unit: int
    limit: int

    def of(self, pieces: list[int]) -> int | None:
        """The distance, or None where there is none for the kernel."""
        (i, start), (j, end) = self.start, self.end
        distance, rest = divmod(pieces[j] + end - pieces[i] - start, self.unit)
        return None if rest or abs(distance) >= self.limit else distance


class Descriptor:
    """A tensor descriptor of which the place is known, not the memory.

    What the hardware reads holds the address, the shape and the box, and nothing of the tensor:
    it is the same for whatever lies there, and kept by address.
    """

    def __init__(self, found: Any, address: Address, meta: dict) -> None:
        self.address = address
        self._like = {
            name: value for name, value in vars(found).items() if name not in ("base", "shape")
        }
        self._like["shape"] = tuple(found.shape)
        self._like["strides"] = tuple(found.strides)
        self._meta = meta
        self._kept: dict[int, Any] = {}
        self.sizes = [*found.shape, *found.strides]

    def at(self, pointer: int) -> Any:
        """What the launcher takes for the box at an address."""
        kept = self._kept.get(pointer)
        if kept is None:
            if len(self._kept) >= MAX_DESCRIPTORS:
                self._kept.clear()
            kept = self._kept[pointer] = self._make(pointer)
        return kept

    def _make(self, pointer: int) -> Any:
        base = types.SimpleNamespace(data_ptr=lambda: pointer)
        make, unused = _descriptor_maker()
        return make(types.SimpleNamespace(base=base, **self._like), self._meta, *unused)[0]


@functools.cache
def _descriptor_maker() -> tuple[Callable, tuple]:
    """What makes arguments of a descriptor and how it was compiled, and what else it takes."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    taken = len(inspect.signature(make_tensordesc_arg).parameters)
    return make_tensordesc_arg, (None,) * (taken - 2)


class Launch:
    """One launch with places for the stream and for what depends on the memory of a call."""

    def __init__(self, kernel: Any, compiled: Any, grid: tuple, values: list) -> None:
        launcher = compiled.run
        grid = (*grid, 1, 1)[:3]
        flags = launcher.launch_cooperative_grid, launcher.launch_pdl
        before = [*grid, None, compiled.function, *flags]
        arguments, places = _expanded(values)
        # Held: once collected, a compiled kernel takes its code from the device.
        self.kernel, self.compiled = kernel, compiled
        self._call = _c_function(launcher)
        hooks = (None, None, None)  # launch metadata, and what to call before and after
        scratch = (None, None)
        if hasattr(launcher, "arg_annotations"):
            self._before = [*before, compiled.packed_metadata, *hooks, *scratch]
            self._before += [launcher.arg_annotations, launcher.kernel_signature]
            self._arguments = arguments
        else:
            self._before = [*before, *scratch, compiled.packed_metadata, *hooks, *arguments]
            self._arguments = None
            places = [(i + len(before) + 6, place) for i, place in places]
        self._addresses = [(i, *place) for i, place in places if type(place) is Address]
        self._boxes = [(i, x.at, *x.address) for i, x in places if type(x) is Descriptor]
        self._distances = [(i, place) for i, place in places if type(place) is Between]

    def run(self, stream: int, pieces: list[int], distances: dict[Between, int]) -> None:
        """Launch on a stream of the current device.

        Args:
            pieces: addresses of the pieces of memory.
            distances: of every `Between` of the call.
        """
        before = self._before.copy()
        before[_STREAM] = stream
        arguments = before if self._arguments is None else self._arguments.copy()
        for i, piece, offset in self._addresses:
            arguments[i] = pieces[piece] + offset
        for i, box_at, piece, offset in self._boxes:
            arguments[i] = box_at(pieces[piece] + offset)
        for i, between in self._distances:
            arguments[i] = distances[between]
        if self._arguments is None:
            self._call(*before)
        else:
            self._call(*before, arguments)

    def distances(self) -> list[Between]:
        """Those of the arguments."""
        return [between for _, between in self._distances]


def _expanded(values: list) -> tuple[list, list[tuple[int, Any]]]:
    """Arguments as the C function takes them, and which of them depend on memory."""
    arguments, places = [], []
    for value in values:
        if isinstance(value, (Address, Between, Descriptor)):
            places.append((len(arguments), value))
            arguments.append(None)
            if isinstance(value, Descriptor):
                arguments += value.sizes
        else:
            arguments.append(value)
    return arguments, places


def _c_function(launcher: Any) -> Any:
    function = launcher.launch
    if inspect.isfunction(function):  # around it: what makes descriptors
        function = inspect.getclosurevars(function).nonlocals["launcher"]
    return function


def why_not(kernel: Any, compiled: Any) -> str | None:
    """Why a kernel cannot be launched directly, or None if it can."""
    if not isinstance(kernel, triton.JITFunction):
        return "it is interpreted"
    if compiled is None:
        return "a hook kept it from being compiled"
    if kernel.pre_run_hooks:
        return "it has hooks"
    launcher = compiled.run
    needed = ("launch", "launch_cooperative_grid", "launch_pdl")
    if not all(hasattr(launcher, name) for name in needed):
        return f"the launcher of triton {triton.__version__} is not known"
    parameters = tuple(inspect.signature(launcher.__call__).parameters)
    annotated = hasattr(launcher, "arg_annotations")
    rest = (
        ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args")
        if annotated
        else ("args",)
    )
    if parameters != _ARGUMENTS + rest:
        return f"the launcher of triton {triton.__version__} is not known"
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return "it needs scratch memory"
    if getattr(launcher, "gsan_enabled", False):
        return "it is sanitized"
    return None


def is_watched() -> bool:
    """Whether somebody wants to see every launch as Triton makes it: profilers and debuggers."""
    runtime = triton.knobs.runtime
    return bool(
        _calls(runtime.launch_enter_hook)
        or _calls(runtime.launch_exit_hook)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or triton.knobs.compilation.instrumentation_mode
    )


@contextlib.contextmanager
def launches_of_this_thread() -> Iterator[list]:
    """A list that grows with every launch that Triton makes inside."""
    found: list = []
    thread = threading.get_ident()

    def see(metadata: Any) -> None:
        if threading.get_ident() == thread:
            found.append(metadata)

    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(see)
    try:
        yield found
    finally:
        hook.remove(see)


def _calls(hook: Any) -> Any:
    return getattr(hook, "calls", hook)


def stream_of(device: int) -> int:
    """The current stream of a device, as a number."""
    return triton.runtime.driver.active.get_current_stream(device)


def on_device(device: int) -> torch.cuda.device | None:
    """What makes a device the current one, or None if it is."""
    if triton.runtime.driver.active.get_current_device() == device:
        return None
    return torch.cuda.device(device)
