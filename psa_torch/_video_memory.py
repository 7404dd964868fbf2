"""What video layers remember between calls, behind operators.

`torch.compile` would guard on every step, name and list that it saw read, and compile again at
every denoising step; a transform would leave its tensors behind. The operators below are opaque to
both: they run on plain tensors when the call runs, and find the layer by a handle.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from psa_torch._vmap import fold
from psa_torch.order import Centroids, TokenOrder, kmeans

_layers: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_ids = itertools.count()


def new_handle(layer: torch.nn.Module) -> Tensor:
    """A tensor that names `layer` to the operators: int64, on the CPU, so reading it is free."""
    identity = next(_ids)
    _layers[identity] = layer
    with torch.inference_mode(False):  # operators count its versions
        return torch.tensor(identity)


def is_recomputation() -> bool:
    """Whether this runs inside a backward pass, as the second forward of a checkpoint does."""
    return torch._C._current_graph_task_id() != -1


@dataclasses.dataclass
class Run:
    """Centroids of one branch of one run.

    Every call of a step starts from `start`, so that calls of one step do not depend on each
    other, and a recomputation clusters as the first pass did.

    Attributes:
        step: the latest step; -1 before the first.
        start: what its calls start from, by side; nothing: they start cold.
        last: what its latest call left.
    """

    step: int = -1
    start: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    last: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def begin(self, step: int) -> None:
        """A call of `step`: a later one starts where the last one ended, an earlier one anew."""
        if step == self.step:
            return
        self.start = self.last if step > self.step else {}
        self.last, self.step = {}, step

    def centroids(self) -> Centroids | None:
        """What the latest call left, None if it clustered nothing."""
        return Centroids(self.last.get("queries"), self.last.get("keys")) if self.last else None


class Place(NamedTuple):
    """Where centroids are remembered: arguments of `remembered_kmeans`."""

    handle: Tensor
    side: str
    step: int | None
    branch: str | None


def places(handle: Tensor, step: int | None, branch: str | None) -> Centroids:
    """Where a `RememberingOrder` finds the centroids of a layer.

    Args:
        handle: of the layer.
        step, branch: None for those of the layer's state.
    """
    return Centroids(*(Place(handle, side, step, branch) for side in Centroids._fields))


class RememberingOrder(TokenOrder):
    """A token order whose `centroids` are `places`: they are read and written there."""

    def _labels(
        self, tokens: Tensor, count: int, warm: Place, curve: Tensor | None
    ) -> tuple[Tensor, None]:
        return remembered_kmeans(tokens.detach(), count, curve, *warm), None


@torch.library.custom_op("psa::remembered_kmeans", mutates_args=("handle",))
def remembered_kmeans(
    tokens: Tensor,
    count: int,
    order: Tensor | None,
    handle: Tensor,
    side: str,
    step: int | None,
    branch: str | None,
) -> Tensor:
    """Labels int32 `[B, H, N]` of k-means that starts from the layer's memory and updates it.

    `handle` is said to change, because the memory behind it does.
    """
    layer = _layers[int(handle)]
    step = layer.state.step if step is None else step
    if branch is None:
        branch = "" if layer.state is None else layer.state.branch
    run = layer._runs.setdefault(branch, Run())
    if is_recomputation():
        if run.step != step:
            raise RuntimeError(
                f"layer {layer.layer!r} is recomputed at step {step} in a backward pass, but its "
                f"centroids are those of step {run.step}: run backward before the next step, and "
                "before reset()"
            )
        return kmeans(tokens, count, centroids=run.start.get(side), order=order)[0]
    run.begin(step)
    start = run.start.get(side)
    labels, run.last[side] = kmeans(tokens, count, centroids=start, order=order)
    return labels


@remembered_kmeans.register_fake
def _(tokens, count, order, handle, side, step, branch):
    return tokens.new_empty(tokens.shape[:3], dtype=torch.int32)


@remembered_kmeans.register_vmap
def _(info, in_dims, tokens, *arguments):
    size = info.batch_size
    labels = remembered_kmeans(fold(tokens, in_dims[0], size), *arguments)
    return labels.unflatten(0, (size, -1)), 0


@torch.library.custom_op("psa::record_density", mutates_args=("handle",))
def record_density(density: Tensor, handle: Tensor, step: int | None) -> None:
    """Note the density `[H]` of one call in the records of the layer's state, once a call."""
    layer = _layers[int(handle)]
    if not is_recomputation():
        step = layer.state.step if step is None else step
        layer.state.records.append(layer.layer, step, density.clone())


@record_density.register_fake
def _(density, handle, step):
    return None


@record_density.register_vmap
def _(info, in_dims, density, *arguments):
    if in_dims[0] is not None:  # the mapped calls are one call of a larger batch
        density = density.mean(in_dims[0])
    record_density(density, *arguments)
    return None, None
