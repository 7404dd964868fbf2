"""How diffusers shards the sequence of a model, read in one place.

`enable_parallelism` tells nobody in public: it leaves its configuration in an attribute of every
attention processor, which `dispatch_attention_fn` is then given. That attribute is private, so a
test holds this against the real class. Were it gone, a shard would still be refused: its length is
not the grid's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

_ATTRIBUTE = "_parallel_config"


class Sharding(NamedTuple):
    """Degrees of context parallelism."""

    ring: bool
    ulysses: bool


def sharding(processors: Iterable[Any]) -> Sharding | None:
    """How the sequence is sharded that these processors attend over; None: it is not."""
    for processor in processors:
        parallel = getattr(processor, _ATTRIBUTE, None)
        context = getattr(parallel, "context_parallel_config", None)
        if context is not None:
            degrees = [getattr(context, f"{name}_degree", 1) or 1 for name in Sharding._fields]
            return Sharding(*(degree > 1 for degree in degrees))
    return None
