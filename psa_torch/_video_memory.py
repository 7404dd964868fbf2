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

from psa_torch._config import Settings, parse_config
from psa_torch._vmap import fold
from psa_torch.choice import choose_levels
from psa_torch.order import Centroids, Permutation, TokenOrder
from shared_specs.geometry import cdiv
from shared_specs.video import Phases

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
    """What one branch of one run remembers.

    Every call of a step starts from `start`, so that calls of one step do not depend on each
    other, and a recomputation clusters as the first pass did.

    Attributes:
        step: the latest step; -1 before the first.
        chosen_at: the step that last chose an order and levels; -1 before the first.
        start: the centroids that its calls started from, by side; nothing: they started cold.
        last: the centroids that its latest call left.
        kept: what its latest call chose, where later steps use it again: `order queries`,
            `order keys` and `levels`.
    """

    step: int = -1
    chosen_at: int = -1
    start: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    last: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    kept: dict[str, tuple[Tensor, ...]] = dataclasses.field(default_factory=dict)

    def begin(self, step: int, refresh_every: int, phases: Phases) -> None:
        """A call of `step`; an earlier one than the last opens a run of its own."""
        if step == self.step:
            return
        is_later = step > self.step
        is_due = self.chosen_at < 0 or step - self.chosen_at >= refresh_every
        if not is_later or is_due or phases.begins_between(self.chosen_at, step):
            self.start = self.last if is_later else {}
            self.last, self.kept, self.chosen_at = {}, {}, step
        self.step = step

    @property
    def chooses(self) -> bool:
        """Whether calls of this step choose, instead of using what an earlier one chose."""
        return self.chosen_at == self.step

    def centroids(self) -> Centroids | None:
        """What the latest call that clustered left, None before one."""
        return Centroids(self.last.get("queries"), self.last.get("keys")) if self.last else None

    def take(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Copies of what was kept, which must have this shape.

        Raises:
            ValueError: it has another, or there is none.
        """
        kept = self.kept.get(name, ())
        if not kept or tuple(kept[0].shape) != shape:
            found = tuple(kept[0].shape) if kept else None
            raise ValueError(
                f"{name} kept since step {self.chosen_at} must have shape {shape}, got {found}: "
                "reset() before another video, and give calls of other shapes a branch of their own"
            )
        return tuple(x.clone() for x in kept)


def _run_of(handle: Tensor, step: int | None, branch: str | None) -> tuple[Run, bool]:
    """The run that a call belongs to, begun for its step, and whether it keeps what it chooses.

    Raises:
        RuntimeError: a recomputation of a step that is no longer the latest.
    """
    layer = _layers[int(handle)]
    step = layer.state.step if step is None else step
    if branch is None:
        branch = "" if layer.state is None else layer.state.branch
    run = layer._runs.setdefault(branch, Run())
    if not is_recomputation():
        run.begin(step, layer.refresh_every, layer.phases)
    elif run.step != step:
        raise RuntimeError(
            f"layer {layer.layer!r} is recomputed at step {step} in a backward pass, but what it "
            f"remembers are those of step {run.step}: run backward before the next step, and "
            "before reset()"
        )
    return run, layer.refresh_every > 1


class Place(NamedTuple):
    """Where an order is remembered: arguments of `remembered_order`."""

    config: str
    handle: Tensor
    side: str
    step: int | None
    branch: str | None


def places(settings: Settings, handle: Tensor, step: int | None, branch: str | None) -> Centroids:
    """Where a `RememberingOrder` finds what a layer remembers of its queries and keys.

    Args:
        settings: the configuration.
        handle: of the layer.
        step, branch: None for those of the layer's state.
    """
    text = settings.to_json()
    return Centroids(*(Place(text, handle, side, step, branch) for side in Centroids._fields))


class RememberingOrder(TokenOrder):
    """A token order whose `centroids` are `places`: they are read and written there."""

    def _clustered(self, tokens: Tensor, count: int, warm: Place) -> tuple[Permutation, None]:
        return Permutation(*remembered_order(tokens.detach(), *warm)), None


@torch.library.custom_op("psa::remembered_order", mutates_args=("handle",))
def remembered_order(
    tokens: Tensor, config: str, handle: Tensor, side: str, step: int | None, branch: str | None
) -> tuple[Tensor, Tensor]:
    """The order int32 `[B, H, L]` of clusters of `tokens [B, H, L, D]`, and its inverse.

    k-means starts from the memory of the layer and updates it; in a step that keeps an earlier
    order there is none. `handle` is said to change, because the memory behind it does.
    """
    run, keeps = _run_of(handle, step, branch)
    if not run.chooses:
        order, inverse = run.take(f"order {side}", tuple(tokens.shape[:3]))
        return order, inverse
    order = TokenOrder.from_config(parse_config(config), tokens.shape[2], tokens.shape[2])
    count = order.query_centroids if side == "queries" else order.key_centroids
    assert count is not None  # only sides with clusters come here
    permutation, centroids = order._clustered(tokens, count, run.start.get(side))
    if not is_recomputation():
        assert centroids is not None
        run.last[side] = centroids
        if keeps:
            run.kept[f"order {side}"] = tuple(x.clone() for x in permutation)
    return tuple(permutation)


@remembered_order.register_fake
def _(tokens, config, handle, side, step, branch):
    return tuple(tokens.new_empty(tokens.shape[:3], dtype=torch.int32) for _ in range(2))


@remembered_order.register_vmap
def _(info, in_dims, tokens, *arguments):
    size = info.batch_size
    found = remembered_order(fold(tokens, in_dims[0], size), *arguments)
    return tuple(x.unflatten(0, (size, -1)) for x in found), (0, 0)


@torch.library.custom_op("psa::remembered_levels", mutates_args=("handle",))
def remembered_levels(
    q: Tensor, k: Tensor, config: str, handle: Tensor, step: int | None, branch: str | None
) -> Tensor:
    """Levels int32 `[B, H, Nq, Nk]` of ordered q and k: chosen, or kept from an earlier step."""
    settings = parse_config(config)
    run, _ = _run_of(handle, step, branch)
    if not run.chooses:
        return run.take("levels", _levels_shape(q, k, settings))[0]
    levels = choose_levels(q, k, settings).levels
    if not is_recomputation():
        run.kept["levels"] = (levels.clone(),)
    return levels


def _levels_shape(q: Tensor, k: Tensor, config) -> tuple[int, ...]:
    rows, columns = cdiv(q.shape[2], config.block_m), cdiv(k.shape[2], config.block_n)
    return (*q.shape[:2], rows, columns)


@remembered_levels.register_fake
def _(q, k, config, handle, step, branch):
    shape = _levels_shape(q, k, parse_config(config))
    return q.new_empty(shape, dtype=torch.int32)


@remembered_levels.register_vmap
def _(info, in_dims, q, k, *arguments):
    size = info.batch_size
    q, k = fold(q, in_dims[0], size), fold(k, in_dims[1], size)
    return remembered_levels(q, k, *arguments).unflatten(0, (size, -1)), 0


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
