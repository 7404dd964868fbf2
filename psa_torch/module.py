"""Pyramid sparse attention as a module."""

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from psa_torch._types import AttentionCall
from psa_torch.functional import psa_attention
from shared_specs.config import PSAConfig, check_config


class PSAAttention(nn.Module):
    """Pyramid sparse attention with a fixed configuration; no parameters, no state.

    Heads do not interact, so processes that each hold some of them need no communication.

    Attributes:
        config: the configuration; frozen, and replaceable between calls.

    Examples:
        With DTensors split over heads on a device mesh (`torch.distributed.tensor`):

        >>> heads = [Shard(1)]
        >>> attend = local_map(PSAAttention(), out_placements=heads, in_placements=(heads,) * 3)
    """

    if TYPE_CHECKING:  # what `nn.Module` makes of `forward` has no type
        __call__: AttentionCall

    def __init__(self, config: PSAConfig | None = None) -> None:
        super().__init__()
        self.config = check_config(config)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        levels: Tensor | None = None,
        return_lse: bool = False,
        return_levels: bool = False,
        implementation: str | None = None,
        q_lens: Tensor | None = None,
        kv_lens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """`psa_torch.psa_attention` with this module's configuration; arguments as there."""
        return psa_attention(
            q,
            k,
            v,
            config=self.config,
            levels=levels,
            return_lse=return_lse,
            return_levels=return_levels,
            implementation=implementation,
            q_lens=q_lens,
            kv_lens=kv_lens,
        )

    def extra_repr(self) -> str:
        """The fields of the configuration that differ from the default."""
        default = PSAConfig()
        changed = {
            field.name: getattr(self.config, field.name)
            for field in dataclasses.fields(PSAConfig)
            if getattr(self.config, field.name) != getattr(default, field.name)
        }
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())
