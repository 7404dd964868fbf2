"""The keywords of the public calls, so that each can say by its flags what it returns."""

from __future__ import annotations

from typing import Literal, Protocol, Required, TypedDict, Unpack, overload

from torch import Tensor

from shared_specs.config import PSAConfig
from shared_specs.config_types import ConfigFields


class Overrides(ConfigFields["float | Tensor | None"], total=False):
    """Fields of `PSAConfig` as keywords."""


class CallArguments(Overrides, total=False):
    """Keywords of `psa_attention` that do not change the kind of result."""

    config: PSAConfig | None
    levels: Tensor | None
    implementation: str | None
    q_lens: Tensor | None
    kv_lens: Tensor | None
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool


class SparseArguments(TypedDict, total=False):
    """Likewise, of `sparse_attention`."""

    block_m: Required[int]
    block_n: Required[int]
    scale: float | Tensor | None
    is_causal: bool
    rest: str
    implementation: str | None
    q_lens: Tensor | None
    kv_lens: Tensor | None


class ModuleArguments(TypedDict, total=False):
    """Likewise, of a `PSAAttention`."""

    levels: Tensor | None
    implementation: str | None
    q_lens: Tensor | None
    kv_lens: Tensor | None


class VideoArguments(TypedDict, total=False):
    """Likewise, of a `PSAVideoAttention`."""

    step: int | None
    branch: str | None
    cross_attention: bool
    implementation: str | None


class AttentionCall(Protocol):
    """Calling a `PSAAttention`."""

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: Literal[False] = False,
        return_levels: Literal[False] = False,
        **arguments: Unpack[ModuleArguments],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: Literal[True],
        return_levels: Literal[True],
        **arguments: Unpack[ModuleArguments],
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: Literal[True],
        return_levels: Literal[False] = False,
        **arguments: Unpack[ModuleArguments],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: Literal[False] = False,
        return_levels: Literal[True],
        **arguments: Unpack[ModuleArguments],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: bool = False,
        return_levels: bool = False,
        **arguments: Unpack[ModuleArguments],
    ) -> Tensor | tuple[Tensor, ...]: ...


class VideoCall(Protocol):
    """Calling a `PSAVideoAttention`."""

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: Literal[False] = False,
        **arguments: Unpack[VideoArguments],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: Literal[True],
        **arguments: Unpack[VideoArguments],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: bool,
        **arguments: Unpack[VideoArguments],
    ) -> Tensor | tuple[Tensor, Tensor]: ...
