"""The launches of a call, written down while it runs, so that later calls repeat just them.

A call can be repeated if all it does on the device is to launch kernels on memory that is its
inputs' or that it allocates itself. Anything else that reaches PyTorch meanwhile (a copy, a cast,
a sum) is seen, and such a call is never repeated. What is kept is numbers and compiled kernels,
and no tensor.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from psa_torch._triton.direct import (
    Address,
    Between,
    Descriptor,
    Distance,
    Launch,
    on_device,
    stream_of,
    why_not,
)
from shared_specs.geometry import cdiv

ALIGNMENT = 512
"""Bytes; memory that PyTorch allocates on a GPU starts at multiples of it."""

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


class Output(NamedTuple):
    """A tensor that a call returns."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class _Allocation:
    """A piece of memory that the call allocated.

    Attributes:
        start, size: bytes.
        first, last: the launches it was there for: allocated before the former, and the latter
            the last that got it.
    """

    def __init__(self, start: int, size: int, first: int) -> None:
        self.start, self.size, self.first, self.last = start, size, first, first - 1


class Recorder(TorchDispatchMode):
    """Sees what a call asks of PyTorch and which kernels it launches.

    Attributes:
        refused: why the call cannot be repeated, or None.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        """
        Args:
            inputs: what the call is given, no two at one place.
        """
        super().__init__()
        self.refused: str | None = None
        self._made = 0
        self._inputs = [x.data_ptr() for x in inputs]
        self._allocations: list[_Allocation] = []
        self._launches: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            storage = result.untyped_storage()
            self._allocations.append(
                _Allocation(storage.data_ptr(), storage.nbytes(), len(self._launches))
            )
        elif not func.is_view:
            self._refuse(f"it calls {func}")
        return result

    def launched(self, kernel: Any, compiled: Any, grid: tuple, args: tuple, options: dict) -> None:
        """Write down a launch, which has been made."""
        self._made += 1
        self._refuse(why_not(kernel, compiled))
        if self.refused is not None:
            return
        descriptors = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        values = []
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        for parameter in kernel.params:
            value = given.get(parameter.name, parameter.default)
            kind = compiled.src.signature[parameter.name]
            values.append(self._argument(parameter, kind, value, descriptors))
        self._launches.append((kernel, compiled, grid, values))

    def _argument(self, parameter: Any, kind: Any, value: Any, descriptors: Any) -> Any:
        if kind == "constexpr":
            return None
        if isinstance(value, Distance):
            # What the kernel was compiled for must not depend on it.
            if not parameter.do_not_specialize:
                self._refuse(f"{parameter.name} is a distance and is specialised")
            ends = self._address(value.start), self._address(value.end)
            return Between(*ends, value.unit, value.limit)
        if isinstance(value, Tensor):
            return self._address(value)
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            meta = next(descriptors, None)
            if meta is None:
                self._refuse("its descriptors are taken apart")
            return Descriptor(value, self._address(value.base), meta)
        if not isinstance(value, (bool, int, float)):
            self._refuse(f"{parameter.name} is a {type(value).__name__}")
        return value

    def _address(self, x: Tensor) -> Address:
        """Pieces are the inputs, then the allocations."""
        pointer = x.data_ptr()
        if pointer in self._inputs:
            return Address(self._inputs.index(pointer), 0)
        # Of two at one place the first is gone.
        for i in reversed(range(len(self._allocations))):
            piece = self._allocations[i]
            if piece.start <= pointer < piece.start + piece.size:
                piece.last = len(self._launches)
                return Address(len(self._inputs) + i, pointer - piece.start)
        self._refuse("it reads memory that is neither an input nor its own")
        return Address(0, 0)

    def _refuse(self, why: str | None) -> None:
        self.refused = self.refused or why

    def plan(self, result: Any, made: int) -> "Plan | None":
        """What repeats the call that returned `result`, or None where nothing does.

        Args:
            made: launches that Triton made meanwhile.
        """
        if made != self._made:
            self._refuse("it launches kernels past launch_kernel")
        results = result if type(result) is tuple else (result,)
        pieces, outputs = [], []
        for x in results:
            if x is None:
                outputs.append(None)
                continue
            address = self._address(x)
            whole = address.piece >= len(self._inputs) and x.is_contiguous() and x.numel() > 0
            if not whole or address.offset or address.piece in pieces:
                self._refuse("it returns a part of something")
            pieces.append(address.piece)
            outputs.append(Output(tuple(x.shape), x.dtype))
        if self.refused is not None:
            return None
        first = len(self._inputs)
        inner = [i for i in range(len(self._allocations)) if first + i not in pieces]
        offsets, size = _packed([self._allocations[i] for i in inner])
        offsets = dict(zip((first + i for i in inner), offsets, strict=True))
        places = {i: Address(i, 0) for i in range(first)}
        places |= {piece: Address(first + i, 0) for i, piece in enumerate(pieces)}
        workspace = first + len(pieces)
        places |= {piece: Address(workspace, offset) for piece, offset in offsets.items()}
        launches = [
            Launch(kernel, compiled, grid, [_moved(value, places) for value in values])
            for kernel, compiled, grid, values in self._launches
        ]
        return Plan(launches, outputs, size, is_tuple=type(result) is tuple)


def _moved(value: Any, places: dict[int, Address]) -> Any:
    """An argument whose pieces have other numbers."""

    def move(address: Address) -> Address:
        piece, offset = places[address.piece]
        return Address(piece, offset + address.offset)

    if type(value) is Address:
        return move(value)
    if type(value) is Between:
        return value._replace(start=move(value.start), end=move(value.end))
    if type(value) is Descriptor:
        value.address = move(value.address)
    return value


def _packed(pieces: list[_Allocation]) -> tuple[list[int], int]:
    """Offsets of pieces in one piece of memory, and its size. Those that are never there at the
    same time may lie in the same place."""
    placed: list[tuple[int, int, _Allocation]] = []
    for piece in pieces:
        size = cdiv(piece.size, ALIGNMENT) * ALIGNMENT
        others = sorted(
            (start, end)
            for start, end, other in placed
            if other.first <= piece.last and piece.first <= other.last
        )
        at = 0
        for start, end in others:
            if at + size <= start:
                break
            at = max(at, end)
        placed.append((at, at + size, piece))
    return [start for start, _, _ in placed], max((end for _, end, _ in placed), default=0)


class Plan:
    """The launches of a call, to be made again on other memory.

    Attributes:
        elsewhere: what `_triton.launch` keeps for where a distance is not for a kernel.
    """

    def __init__(
        self, launches: list[Launch], outputs: list[Output | None], size: int, *, is_tuple: bool
    ) -> None:
        self._launches = launches
        self._outputs = outputs
        self._size = size
        self._is_tuple = is_tuple
        self.elsewhere: Any = None
        distances = itertools.chain.from_iterable(launch.distances() for launch in launches)
        self._distances = list(dict.fromkeys(distances))

    def run(self, inputs: list[Tensor], pieces: list[int]) -> tuple[bool, Any]:
        """Whether the launches could be made on these inputs, and what the call returns.

        Args:
            inputs: tensors of the shapes, strides, dtypes and alignment of those recorded.
            pieces: their addresses; it is added to.
        """
        device = inputs[0].device
        results = [
            None if x is None else torch.empty(x.shape, dtype=x.dtype, device=device)
            for x in self._outputs
        ]
        pieces += [x.data_ptr() for x in results if x is not None]
        if self._size:
            workspace = torch.empty(self._size, dtype=torch.uint8, device=device)
            pieces.append(workspace.data_ptr())
        distances = {}
        for between in self._distances:
            distance = distances[between] = between.of(pieces)
            if distance is None:
                return False, None
        index = inputs[0].get_device()
        context = on_device(index)
        if context is None:
            self._launch(index, pieces, distances)
        else:
            with context:
                self._launch(index, pieces, distances)
        return True, tuple(results) if self._is_tuple else results[0]

    def _launch(self, device: int, pieces: list[int], distances: dict[Between, int]) -> None:
        stream = stream_of(device)
        for launch in self._launches:
            launch.run(stream, pieces, distances)
