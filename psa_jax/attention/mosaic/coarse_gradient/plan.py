"""Where the gradients of coarse pyramid rows wait to be summed, and in which order.

At a coarse level a key block has few rows, too few for a product of its own with the queries that
list it. So query blocks take turns instead: each multiplies the blocks that it lists, packed into
tiles of 64 rows as the forward pass does, and leaves every block's gradient in a slot. Then the
slots of a key block are summed.

A query block's slots are as many as there are key blocks, filled from the first one in the order
of its table row: no mask can overflow them, and tiles leave in one piece. What is not listed is
never written and never read. A round takes as many query blocks as fit the workspace.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psa_jax.attention.mosaic.configs import CoarseConfig
from psa_jax.attention.mosaic.geometry import ROWS, TiledGeometry
from psa_jax.attention.mosaic.query_plan import (
    FIRST,
    QueryPlan,
    needed,
    pack_covers,
    pad_query_blocks,
)
from shared_specs.constants import LEVELS
from shared_specs.geometry import cdiv

SPANS = 4
"""int32 per row of `CoarsePlan.spans`; named by the columns below."""
FULL, TAIL, FIRST_ENTRY, LISTED = range(SPANS)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Static facts of the rounds of one level.

    A round takes `heads_per_round` key/value heads with all their query heads, and of each query
    head `queries_per_round` query blocks. Only if one key/value head does not fit the workspace
    is it split by query blocks, since sums then have to be carried from round to round.

    Attributes:
        geometry: with tiles of 64 rows.
        level: index of the level in `LEVELS`.
        head_dim: of 16-bit values.
        blocks: thread blocks that work at the same time; a round has an item for each of them,
            whatever the workspace.
    """

    geometry: TiledGeometry
    level: int
    config: CoarseConfig
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    interpreted: bool

    @property
    def pitch(self) -> int:
        """Rows of a slot."""
        return self.geometry.pitch[self.level]

    @property
    def slots_per_tile(self) -> int:
        return ROWS // self.pitch

    @property
    def slots_per_item(self) -> int:
        """Slots of a query block: whole tiles, because tiles are stored whole."""
        return cdiv(self.geometry.k_blocks, self.slots_per_tile) * self.slots_per_tile

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @functools.cached_property
    def _items_that_fit(self) -> int:
        item = 2 * 2 * self.slots_per_item * self.pitch * self.head_dim  # dk and dv, 2 bytes each
        return max(self.config.workspace_bytes // item, self.blocks)

    @functools.cached_property
    def splits(self) -> int:
        """Rounds that one key/value head is split into."""
        fit = max(self._items_that_fit // self.group, 1)
        return cdiv(self.geometry.padded_q_blocks, fit)

    @property
    def queries_per_round(self) -> int:
        return cdiv(self.geometry.padded_q_blocks, self.splits)

    @functools.cached_property
    def heads_per_round(self) -> int:
        """Key/value heads, a divisor of all of them."""
        total = self.batch * self.kv_heads
        fit = self._items_that_fit // (self.group * self.geometry.padded_q_blocks)
        return max(n for n in range(1, total + 1) if total % n == 0 and n <= max(fit, 1))

    @property
    def head_rounds(self) -> int:
        return self.batch * self.kv_heads // self.heads_per_round

    @property
    def items(self) -> int:
        """Query blocks of a round."""
        return self.heads_per_round * self.group * self.queries_per_round

    @property
    def padded_queries(self) -> int:
        """Query blocks of a head in all its rounds."""
        return self.splits * self.queries_per_round

    @property
    def tail_tiles(self) -> int:
        """Most masked tiles of a query block, as `masked_chunk_capacity` of the geometry."""
        blocks = min(self.geometry.k_blocks, self.geometry.masked_blocks)
        return cdiv(self.slots_per_tile - 1 + blocks, self.slots_per_tile)


class CoarsePlan(NamedTuple):
    """What the kernels of the rounds read.

    Attributes:
        entries: int32 `[B * H * padded_q_blocks, Nk]`, the table.
        spans: int32 `[B * H * padded_queries, 4]`: full tiles, tail tiles, first entry of the
            level, entries of the level that can be seen at all.
        tail_covers: int32 `[B * H * padded_queries, tail_tiles, 64]`, see `pack_covers`.
        slots: int32 `[head_rounds * splits * heads_per_round * Nk, group * queries_per_round]`,
            the slots that hold a gradient of each key block, ascending, by query head and block.
        counts: int32 `[head_rounds * splits * heads_per_round * Nk]`, how many there are.
    """

    entries: jax.Array
    spans: jax.Array
    tail_covers: jax.Array
    slots: jax.Array
    counts: jax.Array


def coarse_plan(levels: jax.Array, walk: QueryPlan, rounds: Rounds) -> CoarsePlan:
    """Plan of one level.

    Args:
        levels: int32 `[B, H, Nq, Nk]`, values in {0, 1, 2, 4, 8}.
        walk: the plan of the dq kernel for the same levels.
    """
    geometry, g = rounds.geometry, rounds.level
    levels = pad_query_blocks(levels, geometry)
    lead = levels.shape[:3]
    chex.assert_shape(levels, (rounds.batch, rounds.heads, None, None))
    chex.assert_equal_size([walk.entries, levels])
    seen, whole = needed(levels, geometry, g)
    listed, whole = (x.sum(-1, dtype=jnp.int32) for x in (seen, whole))
    first = walk.spans[:, FIRST][:, g].reshape(lead)
    full = whole // rounds.slots_per_tile
    tails = -(-listed // rounds.slots_per_tile) - full
    spans = _pad_queries(jnp.stack([full, tails, first, listed], -1), rounds)
    covers = _tail_covers(walk.entries.reshape(levels.shape), full, first, listed, rounds)
    slots, counts = _slots(seen, rounds)
    return CoarsePlan(
        entries=walk.entries,
        spans=spans.reshape(-1, SPANS),
        tail_covers=_pad_queries(covers, rounds).reshape(-1, rounds.tail_tiles, ROWS),
        slots=slots,
        counts=counts,
    )


def _pad_queries(x: jax.Array, rounds: Rounds) -> jax.Array:
    missing = rounds.padded_queries - x.shape[2]
    return jnp.pad(x, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 3))


def _tail_covers(entries, full, first, listed, rounds: Rounds) -> jax.Array:
    """What each row of the tail tiles covers, `[B, H, padded_q_blocks, tail_tiles * 64]`."""
    geometry, g = rounds.geometry, rounds.level
    place = full[..., None] * rounds.slots_per_tile
    place = place + jnp.arange(rounds.tail_tiles * rounds.slots_per_tile, dtype=jnp.int32)
    present = place < listed[..., None]
    block = jnp.take_along_axis(entries, jnp.where(present, first[..., None] + place, 0), -1)
    inside = np.arange(rounds.pitch, dtype=np.int32)
    token = block[..., None] * geometry.rows[g] + inside
    count = jnp.clip(geometry.kv_len - token * LEVELS[g], 0, LEVELS[g])
    last = jnp.minimum((token + 1) * LEVELS[g], geometry.kv_len) - 1
    real = present[..., None] & (inside < geometry.rows[g])
    return jnp.where(real, pack_covers(count, last), 0).reshape(*full.shape, -1)


def _slots(here: jax.Array, rounds: Rounds) -> tuple[jax.Array, jax.Array]:
    """`CoarsePlan.slots` and `.counts` of where the level is listed, bool `[B, H, Nq', Nk]`."""
    group, queries, per_round = rounds.group, rounds.queries_per_round, rounds.heads_per_round
    here = _pad_queries(here, rounds)
    key_blocks = here.shape[-1]
    rank = jnp.cumsum(here, axis=-1, dtype=jnp.int32) - here
    split = (-1, per_round, group, rounds.splits, queries, key_blocks)
    here, rank = here.reshape(split), rank.reshape(split)
    item = np.arange(per_round * group * queries, dtype=np.int32)
    item = item.reshape(per_round, group, 1, queries, 1)
    slot = jnp.where(here, item * rounds.slots_per_item + rank, np.iinfo(np.int32).max)
    order = (0, 3, 1, 5, 2, 4)
    slot, here = (x.transpose(order).reshape(-1, group * queries) for x in (slot, here))
    return jnp.sort(slot, axis=-1, stable=False), here.sum(-1, dtype=jnp.int32)
