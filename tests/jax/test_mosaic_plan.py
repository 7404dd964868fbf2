"""The arrays that the mosaic kernels walk, decoded and compared with the mask they came from."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from psa_jax.attention.mosaic.coarse_gradient.plan import (
    FIRST_ENTRY,
    FULL,
    LISTED,
    Rounds,
    coarse_plan,
)
from psa_jax.attention.mosaic.coarse_gradient.plan import TAIL as SLOT_TAIL
from psa_jax.attention.mosaic.configs import coarse_config
from psa_jax.attention.mosaic.geometry import CHUNK, QUERY_TILE, ROWS, TiledGeometry
from psa_jax.attention.mosaic.key_plan import (
    BLOCK_BITS,
    KeyTiles,
    key_plan,
    unpack_row,
    visited_query,
)
from psa_jax.attention.mosaic.pyramid_rows import pooled_rows
from psa_jax.attention.mosaic.query_plan import (
    ENDS,
    FIRST,
    HALF,
    TAIL,
    query_plan,
    unpack_covers,
)
from shared_specs.constants import LEVELS, MASK_LEVELS
from shared_specs.pyramid import build_pyramid, level_start

BLOCKS = list(itertools.product((64, 128), (32, 64, 128)))
LENGTHS = [(200, 777), (129, 70)]


def random_levels(rng, geometry, heads):
    n_q = -(-geometry.q_len // geometry.block_m)
    levels = rng.choice(MASK_LEVELS, size=(1, heads, n_q, geometry.k_blocks))
    levels[0, 0, 0] = rng.choice(LEVELS)
    levels[0, -1, -1] = 0
    return levels.astype(np.int32)


def wanted(levels, geometry, row):
    """(level, token) -> (keys covered, last key) of what a row of the mask may see at all."""
    top = row * geometry.block_m + geometry.block_m - 1 + geometry.offset
    tokens = {}
    for block, level in enumerate(levels):
        if not level or (geometry.is_causal and block * geometry.block_n > top):
            continue
        size = geometry.block_n // level
        for token in range(block * size, (block + 1) * size):
            count = min(geometry.kv_len - token * level, level)
            if count > 0:
                tokens[level, token] = count, token * level + count - 1
    return tokens


def token_of(geometry, row):
    """(level, token) of a row of the kernels' pyramid; token None where it holds nothing."""
    g = max(g for g in range(len(LEVELS)) if geometry.start[g] <= row)
    block, inside = divmod(row - geometry.start[g], geometry.pitch[g])
    token = block * geometry.rows[g] + inside if inside < geometry.rows[g] else None
    return LEVELS[g], token


def walked(plan, geometry, row):
    """What the kernels take for one row of the plan: like `wanted`, and how often."""
    spans, entries = plan.spans[row], plan.entries[row]
    found, unmasked = [], []

    def stream(g, tile):
        rows = np.arange(tile * geometry.tile, (tile + 1) * geometry.tile)
        block = entries[spans[FIRST][g] + rows // geometry.pitch[g]]
        return geometry.start[g] + block * geometry.pitch[g] + rows % geometry.pitch[g]

    for g in geometry.dense_levels:
        for tile in range(spans[ENDS][g] - (spans[ENDS][g - 1] if g else 0)):
            unmasked += [token_of(geometry, r) for r in stream(g, tile)]
    for tile in range(spans[HALF]):
        count, _ = unpack_covers(plan.half_covers[0, 0])
        rows = zip(stream(len(LEVELS) - 1, tile), count, strict=True)
        unmasked += [token_of(geometry, r) for r, c in rows if c]
        assert (count[count > 0] == LEVELS[-1]).all()
    for tile in range(spans[TAIL]):
        starts = plan.tail_start[row].reshape(-1, geometry.chunks)[tile]
        rows = (starts[:, None] + np.arange(CHUNK)).ravel()
        for r, count, last in zip(rows, *unpack_covers(plan.tail_covers[row, tile]), strict=True):
            if count:
                found.append((token_of(geometry, r), (count, last)))
    return found, unmasked


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
def test_walk_visits_every_token_once(block_m, block_n, is_causal, rng):
    tile = 64 if block_m == 128 else 128
    for q_len, kv_len in LENGTHS:
        geometry = TiledGeometry(q_len, kv_len, block_m, block_n, is_causal, tile)
        levels = random_levels(rng, geometry, heads=2)
        plan = jax.tree.map(np.asarray, jax.jit(query_plan, static_argnums=1)(levels, geometry))
        n_q = levels.shape[2]
        for head, row in itertools.product(range(2), range(geometry.padded_q_blocks)):
            masked, unmasked = walked(plan, geometry, head * geometry.padded_q_blocks + row)
            want = wanted(levels[0, head, row], geometry, row) if row < n_q else {}
            masked_tokens = [token for token, _ in masked]
            assert sorted(masked_tokens + unmasked) == sorted(want)
            assert all(covers == want[token] for token, covers in masked)
            for level, token in unmasked:
                count, last = want[level, token]
                assert count == level, "a token of a ragged block without its own bias"
                seen_by_first = row * block_m + geometry.offset
                assert not is_causal or last <= seen_by_first, "a hidden token without a mask"


def test_the_worst_tail_fits(rng):
    """Rows that leave the longest remainder at every level and straddle the diagonal."""
    for block_m, block_n in BLOCKS:
        geometry = TiledGeometry(512, 509, block_m, block_n, True, 128)
        levels = random_levels(rng, geometry, heads=2)
        levels[0, 0] = 1
        spans = np.asarray(jax.jit(query_plan, static_argnums=1)(levels, geometry).spans)
        assert spans[:, TAIL].max() <= geometry.masked_chunk_capacity // geometry.chunks


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
@pytest.mark.parametrize("key_levels", [(0, 1), (0, 1, 2, 3)])
def test_key_walk_visits_every_pair_once(block_m, block_n, is_causal, key_levels, rng):
    for q_len, kv_len in LENGTHS:
        geometry = TiledGeometry(q_len, kv_len, block_m, block_n, is_causal, 64)
        tiles = KeyTiles(geometry, key_levels)
        levels = random_levels(rng, geometry, heads=4)
        plan = jax.jit(key_plan, static_argnums=(1, 2))(levels, 2, tiles)
        plan = jax.tree.map(np.asarray, plan)
        n_q, pairs = levels.shape[2], {}
        for kv_head, tile in itertools.product(range(2), range(tiles.total)):
            row = kv_head * tiles.total + tile
            visits, masked = plan.counts[row]
            count, block, last = unpack_row(plan.rows[tile])
            tokens = [token_of_tile(tiles, tile, r) for r in range(ROWS)]
            for place, visit in enumerate(plan.visits[row, :visits]):
                member, query_block = divmod(visited_query(visit), geometry.padded_q_blocks)
                bits = visit & (1 << BLOCK_BITS) - 1
                seen = [r for r in range(ROWS) if bits >> block[r] & 1 and count[r]]
                pair = pairs.setdefault((kv_head * 2 + member, query_block), [])
                pair += [(tokens[r], (count[r], last[r])) for r in seen]
                first_query = query_block * block_m + geometry.offset
                needs_mask = is_causal and any(last[r] > first_query for r in seen)
                assert place < masked or not needs_mask
        for head, row in itertools.product(range(4), range(n_q)):
            want = wanted(levels[0, head, row], geometry, row).items()
            want = [pair for pair in want if LEVELS.index(pair[0][0]) in key_levels]
            assert sorted(pairs.get((head, row), [])) == sorted(want)


def token_of_tile(tiles, tile, row):
    g = max(g for g in tiles.levels if tiles.first[g] <= tile)
    block, inside = divmod((tile - tiles.first[g]) * ROWS + row, tiles.geometry.pitch[g])
    return LEVELS[g], block * tiles.geometry.rows[g] + inside


def rounds_of(geometry, level, workspace_bytes, blocks):
    config = dataclasses.replace(
        coarse_config(64, geometry.block_m), workspace_bytes=workspace_bytes
    )
    return Rounds(geometry, LEVELS.index(level), config, 1, 4, 2, 64, blocks, True)


@pytest.mark.parametrize("workspace_bytes", [1, 1 << 30], ids=["split", "at once"])
@pytest.mark.parametrize("level", [4, 8])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS)
def test_every_slot_is_filled_by_one_query_block_and_summed_once(
    block_m, block_n, is_causal, level, workspace_bytes, rng
):
    for q_len, kv_len in LENGTHS:
        geometry = TiledGeometry(q_len, kv_len, block_m, block_n, is_causal, ROWS)
        rounds = rounds_of(geometry, level, workspace_bytes, blocks=2)
        levels = random_levels(rng, geometry, heads=4)
        plan = jax.jit(lambda x, g=geometry, r=rounds: coarse_plan(x, query_plan(x, g), r))(levels)
        plan = jax.tree.map(np.asarray, plan)
        assert (rounds.splits > 1) == (workspace_bytes == 1)
        for number in range(rounds.head_rounds * rounds.splits):
            filled = filled_slots(plan, geometry, rounds, levels, number)
            units = rounds.heads_per_round * geometry.k_blocks
            summed = {}
            for unit in range(units):
                row = number * units + unit
                slots = plan.slots[row, : plan.counts[row]]
                assert (np.diff(slots) > 0).all()
                kv_head, block = divmod(unit, geometry.k_blocks)
                summed |= {int(slot): (kv_head, block) for slot in slots}
            assert summed == filled


def filled_slots(plan, geometry, rounds, levels, number):
    """Slot -> (key/value head of the round, key block) of what the kernel leaves in one round."""
    filled = {}
    heads = rounds.heads_per_round * rounds.group
    for local_head, local in itertools.product(range(heads), range(rounds.queries_per_round)):
        head = number // rounds.splits * heads + local_head
        query = number % rounds.splits * rounds.queries_per_round + local
        spans = plan.spans[head * rounds.padded_queries + query]
        if query >= levels.shape[2]:
            assert (spans[[FULL, SLOT_TAIL, LISTED]] == 0).all()
            continue
        entries = plan.entries[head * geometry.padded_q_blocks + query]
        blocks = entries[spans[FIRST_ENTRY] :][: spans[LISTED]]
        covers = plan.tail_covers[head * rounds.padded_queries + query]
        count, last = (x[: spans[SLOT_TAIL]].ravel() for x in unpack_covers(covers))
        level, found = LEVELS[rounds.level], {}
        for place, block in enumerate(blocks):
            tokens = block * geometry.rows[rounds.level] + np.arange(geometry.rows[rounds.level])
            at = (place - spans[FULL] * rounds.slots_per_tile) * rounds.pitch
            for inside, token in enumerate(tokens):
                covered = (level, token * level + level - 1)
                if at >= 0:
                    covered = count[at + inside], last[at + inside]
                if covered[0] > 0:
                    found[level, token] = covered
            item = local_head * rounds.queries_per_round + local
            filled[item * rounds.slots_per_item + place] = local_head // rounds.group, block
        # Rows of the tail tiles that no block has must not count.
        assert (count > 0).sum() == sum(
            1
            for level_token in found
            if place_of(blocks, level_token, geometry, rounds) >= spans[FULL]
        )
        want = wanted(levels[0, head, query], geometry, query)
        assert found == {key: value for key, value in want.items() if key[0] == level}
        assert spans[SLOT_TAIL] <= rounds.tail_tiles
    return filled


def place_of(blocks, level_token, geometry, rounds):
    """Tile of a token in its query block's list."""
    block = level_token[1] // geometry.rows[rounds.level]
    return list(blocks).index(block) // rounds.slots_per_tile


@pytest.mark.parametrize("block_n", [32, 64, 128])
def test_pooled_rows_are_those_of_the_pyramid(block_n, rng):
    k = rng.standard_normal((2, 2, 300, 8)).astype(np.float32)
    geometry = TiledGeometry(100, 300, 128, block_n, False, 64)
    rows = build_pyramid(k, k, block_n).k[:, :, level_start(300, block_n, 2) :]
    ours = np.asarray(pooled_rows(jax.numpy.asarray(rows), geometry))
    assert ours.shape == (4, geometry.stored_rows, 8)
    theirs = rows.reshape(4, -1, 8)
    tokens = [token_of(geometry, geometry.first_pooled + r) for r in range(geometry.stored_rows)]
    place = [r for r, (_, token) in enumerate(tokens) if token is not None]
    assert all(level > 1 for level, _ in tokens)
    np.testing.assert_array_equal(ours[:, place], theirs)
    gaps = sorted(set(range(geometry.stored_rows)) - set(place))
    assert (ours[:, gaps] == 0).all() and bool(gaps) == (block_n == 32)


def test_query_blocks_are_rounded_up_to_query_tiles():
    geometry = TiledGeometry(129, 64, 64, 64, False, 64)
    assert geometry.padded_q_blocks * 64 == geometry.padded_queries == 2 * QUERY_TILE


@pytest.mark.parametrize(
    "levels",
    [
        np.ones((1, 2, 3, 4), np.int32),  # a query block too many
        np.ones((1, 2, 2, 5), np.int32),
        np.ones((2, 2, 4), np.int32),
        np.ones((1, 2, 2, 4), np.int8),
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)
def test_levels_of_another_call_stop_at_the_door(levels):
    geometry = TiledGeometry(200, 250, 128, 64, False, 64)
    tiles = KeyTiles(geometry, (0, 1, 2, 3))
    query_plan(np.ones((1, 2, 2, 4), np.int32), geometry)
    for plan in (
        lambda: query_plan(levels, geometry),
        lambda: key_plan(levels, 2, tiles),
    ):
        with pytest.raises(AssertionError, match="assert_(shape|type)"):
            plan()
