"""The token order once a model: tokens enter it before the first block and leave it after the last.

Blocks treat tokens alike except for attention and rotary tables. So hidden states and tables are
moved once, through forward hooks on the modules that make them, and every attention between finds
its tokens in order; only what the last module makes is moved back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from psa_torch.order import Permutation, TokenOrder, permute
from shared_specs.config import PSAConfig

FIXED_METHODS = ("Gilbert", "STA")
"""Orders that the grid alone decides, the same for every layer and head."""

Arguments = Mapping[str, Any]


class Moves:
    """Moves of tensors into the order of one grid, and back.

    Attributes:
        grid: tokens (frames, height, width).
        length: their number.
    """

    def __init__(self, method: str | None, grid: tuple[int, int, int], tile) -> None:
        self.grid, self.length = grid, math.prod(grid)
        self._method, self._tile = method, tile

    def into(self, x: Tensor, dim: int, text: int = 0) -> Tensor:
        """`x` with its dimension `dim`, `text` tokens and then the video, in the order."""
        return _move(x, dim, self._permutation(x, text), self.length + text)

    def back(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of `into` without text."""
        return _move(x, dim, self._permutation(x, 0).reversed(), self.length)

    def _permutation(self, x: Tensor, text: int) -> Permutation:
        plan = TokenOrder(self._method, self.length + text, self.grid, self._tile, text, "start")
        return plan._fixed(x)  # one operator, whose arrays are made once for each device


def _move(x: Tensor, dim: int, permutation: Permutation, length: int) -> Tensor:
    if x.shape[dim] != length:
        raise ValueError(
            f"{x.shape[dim]} tokens where the token order has {length}: the sequence is sharded, "
            "or the family's route does not describe this model; use order='layer'"
        )
    flat = x.reshape(1, math.prod(x.shape[:dim]), length, -1)
    return permute(flat, permutation.order, permutation.inverse).reshape(x.shape)


Enter = Callable[[Any, Moves], Any]
"""From a value that has a token dimension, or several such values, and the moves: the same, in
order."""


def tokens(dim: int) -> Enter:
    """Every tensor of a value has its tokens along `dim`."""

    def enter(value: Any, moves: Moves) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(enter(item, moves) for item in value)
        return moves.into(value, dim)

    return enter


def per_token_times(value: Any, moves: Moves) -> Any:
    """Timesteps `[B]`, the same for all tokens, or `[B, L, ...]`, one for each."""
    return moves.into(value, 1) if value.ndim > 1 and value.shape[1] == moves.length else value


def patches(x: Tensor, moves: Moves) -> Tensor:
    """Embedded patches `[B, C, T, H, W]`, which the model then reads as `[B, L, C]`.

    What is returned looks like the input and is contiguous as the model reads it.
    """
    return moves.into(x.flatten(2).transpose(1, 2), 1).transpose(1, 2).unflatten(2, moves.grid)


def frames_of_patches(x: Tensor, moves: Moves) -> Tensor:
    """Embedded patches `[B T, H W, C]`."""
    return moves.into(x.reshape(-1, moves.length, x.shape[-1]), 1).reshape(x.shape)


def text_then_video(x: Tensor, moves: Moves) -> Tensor:
    """Joined tokens `[B, text + L, C]`."""
    return moves.into(x, 1, x.shape[1] - moves.length)


@dataclasses.dataclass(frozen=True)
class Route:
    """Where tokens enter a token order and leave it, in a model that treats them alike between.

    Attributes:
        outputs: name of a submodule -> how its output enters the order.
        arguments: name of an argument of the model's forward -> how it enters; None is left alone.
        leave: name of the submodule after which tokens are put back; its output is `[B, L, C]`.
        refuses: from the model and its arguments: why this forward has to move tokens inside each
            layer, or None.
    """

    outputs: Mapping[str, Enter]
    arguments: Mapping[str, Enter] = dataclasses.field(default_factory=dict)
    leave: str = "proj_out"
    refuses: Callable[[nn.Module, Arguments], str | None] = lambda model, arguments: None


class Ordering:
    """The hooks of one model, and whether its present forward is in order.

    Attributes:
        active: the moves of this forward; None while tokens are as the model puts them.
    """

    def __init__(self, model: nn.Module, route: Route | None) -> None:
        self.active: Moves | None = None
        self._route = route
        self._model = model
        self._known: dict[tuple, Moves] = {}
        self._seen: set[str] = set()
        self._hooks: list = []
        self._missing: list[str] = []

    @property
    def route(self) -> Route:
        """The route, of a model that has one."""
        assert self._route is not None
        return self._route

    def install(self) -> None:
        if self._route is None:
            return
        names = [*self._route.outputs, self._route.leave]
        self._missing = [n for n in names if n not in dict(self._model.named_modules())]
        if self._missing:
            return
        for name, enter in self._route.outputs.items():
            module = self._model.get_submodule(name)
            # Not closures: a copy of the model has hooks of its own, bound to its own ordering.
            hook = functools.partial(self._enters, name, enter)
            self._hooks.append(module.register_forward_hook(hook))
        last = self._model.get_submodule(self._route.leave)
        self._hooks.append(last.register_forward_hook(self._leaves))

    def remove(self) -> None:
        self.active = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def why_inside_layers(self, config: PSAConfig, arguments: Arguments) -> str | None:
        """Why this forward cannot be in order as a whole; None: it can."""
        if config.rearrange_method not in FIXED_METHODS:
            return f"{config.rearrange_method} is no fixed order"
        if self._route is None:
            return "the family names no route"
        if self._missing:
            return f"the model has no {', '.join(self._missing)}"
        if getattr(self._model, "is_cache_enabled", False):
            return "a cache keeps hidden states from step to step"
        return self._route.refuses(self._model, arguments)

    def begin(self, config: PSAConfig, grid, args: tuple, kwargs: dict, names) -> tuple:
        """Start a forward in order: the arguments of the model, those with tokens moved.

        Args:
            config: its order and tile.
            grid: tokens (frames, height, width).
            args, kwargs: of the forward.
            names: of the parameters of the forward, in order.
        """
        key = (config.rearrange_method, tuple(grid), config.tile_size)
        if key not in self._known:
            tile = TokenOrder.from_config(
                dataclasses.replace(config, grid=grid, text_length=0), *(2 * [math.prod(grid)])
            ).tile
            self._known[key] = Moves(config.rearrange_method, tuple(grid), tile)
        self.active = self._known[key]
        self._seen.clear()
        places, named = list(args), dict(kwargs)
        for name, enter in self.route.arguments.items():
            # In place: what came by keyword has to stay one, decorators look for it there.
            where: Any = named if name in named else places
            at: Any = name if name in named else names.index(name)
            if (name in named or at < len(places)) and where[at] is not None:
                where[at] = enter(where[at], self.active)
        return tuple(places), named

    def end(self) -> None:
        """Finish a forward.

        Raises:
            RuntimeError: tokens did not pass by every place of the route.
        """
        if self.active is None:
            return
        self.active = None
        missed = {*self.route.outputs, self.route.leave} - self._seen
        if missed:
            raise RuntimeError(
                f"the forward did not call {', '.join(sorted(missed))}, where tokens enter or "
                "leave the token order: use order='layer'"
            )

    def _enters(self, name: str, enter: Enter, module, args, output):
        if self.active is None:
            return None
        self._seen.add(name)
        return enter(output, self.active)

    def _leaves(self, module, args, output):
        if self.active is None:
            return None
        self._seen.add(self.route.leave)
        return self.active.back(output, 1)
