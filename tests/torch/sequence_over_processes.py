"""One process of a group that spreads a sequence over its members; run by test_distributed.py.

Usage: python sequence_over_processes.py RANK WORLD STORE_FILE
"""

import contextlib
import datetime
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import psa_torch
from psa_torch import PSAConfig, distributed
from shared_specs.head_plan import head_plan

# name: batch, heads, kv_heads, length, dtype, configuration
CASES = {
    "uneven lengths and heads": (1, 5, 5, 1001, torch.float32, PSAConfig()),
    "batch and grouped heads": (2, 6, 3, 640, torch.float32, PSAConfig(causal=True)),
    "shared key heads": (1, 12, 1, 700, torch.float32, PSAConfig(causal=True, sink_blocks=1)),
    "threshold": (1, 4, 4, 900, torch.float32, PSAConfig(mask_mode="thresholdbound")),
    "similarity": (
        1,
        6,
        3,
        900,
        torch.float32,
        PSAConfig(attn_impl="old_mask_type", block_n=128, use_sim_mask=True, sim_8x_threshold=0.5),
    ),
    "order and text": (
        1,
        3,
        3,
        12 * 8 * 8 + 20,
        torch.float32,
        PSAConfig(rearrange_method="Gilbert", grid=(12, 8, 8), text_length=20),
    ),
    "bfloat16": (1, 4, 4, 512, torch.bfloat16, PSAConfig()),
}


class Counted:
    """Calls and bytes of every exchange."""

    def __init__(self):
        self.calls, self.bytes = 0, 0

    @contextlib.contextmanager
    def counting(self):
        plain = dist.all_to_all_single

        def counted(out, packed, received, sent, group):
            self.calls += 1
            own = sent[dist.get_rank(group)]
            self.bytes += (sum(sent) - own) * packed.element_size()
            return plain(out, packed, received, sent, group=group)

        dist.all_to_all_single = counted
        try:
            yield self
        finally:
            dist.all_to_all_single = plain


def split(x, lengths, rank):
    return x.split(lengths, 2)[rank].detach().clone()


def check(name, rank, world):
    batch, heads, kv_heads, length, dtype, config = CASES[name]
    generator = torch.Generator().manual_seed(len(name))

    def draw(h, *sizes):
        return torch.randn(batch, h, *sizes, generator=generator).to(dtype)

    whole = [draw(h, length, 32).requires_grad_() for h in (heads, kv_heads, kv_heads)]
    dout, dlse = draw(heads, length, 32), draw(heads, length).float()
    lengths = [len(part) for part in torch.arange(length).tensor_split(world)]
    out, lse, levels = psa_torch.psa_attention(
        *whole, config=config, return_lse=True, return_levels=True
    )
    want = torch.autograd.grad((out, lse), whole, (dout, dlse))

    mine = [split(x, lengths, rank).requires_grad_() for x in whole]

    def run():
        with Counted().counting() as counted:
            found = distributed.psa_attention(
                *mine,
                group=dist.group.WORLD,
                lengths=lengths,
                config=config,
                return_lse=True,
                return_levels=True,
            )
            forward = counted.calls, counted.bytes
            grads = torch.autograd.grad(
                found[:2], mine, (split(dout, lengths, rank), split(dlse, lengths, rank))
            )
        assert (forward[0], counted.calls) == (5, 10), (forward, counted.calls)
        return found, grads, forward[1]

    (got, got_lse, got_levels), grads, sent = run()
    plan = head_plan(batch, heads, kv_heads, world)
    rows = plan.q_rows[rank]
    assert torch.equal(got_levels[0], levels.flatten(0, 1)[rows.start : rows.stop]), name
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, split(out, lengths, rank), **tolerance)
    torch.testing.assert_close(got_lse, split(lse, lengths, rank), **tolerance)
    for have, full in zip(grads, want, strict=True):
        torch.testing.assert_close(have, split(full, lengths, rank), **tolerance)
    again = run()
    for have, before in zip(again[1], grads, strict=True):
        assert torch.equal(have, before), f"{name}: gradients do not repeat"
    # Every element of q, k, v leaves this rank once for each other rank that computes its head.
    element = dtype.itemsize
    others = [r for r in range(world) if r != rank]
    away = sum(len(plan.q_rows[r]) + 2 * len(plan.kv_rows[r]) for r in others) * lengths[rank]
    back = len(rows) * (length - lengths[rank])
    assert sent == 32 * element * (away + back) + 4 * back, (name, sent)


def refuse(rank, world):
    q = torch.randn(1, 4, 8, 16)
    call = distributed.psa_attention

    def expect(kind, words, *arguments, **options):
        with Counted().counting() as counted:
            try:
                call(*arguments, **{"group": dist.group.WORLD, **options})
            except kind as error:
                assert words in str(error), (words, str(error))
            else:
                raise AssertionError(f"not refused: {words}")
        assert counted.calls == 0

    expect(TypeError, "group must be", q, q, q, group="world")
    expect(ValueError, "lengths must have", q, q, q, lengths=[8] * (world + 1))
    expect(ValueError, "lengths must have", q, q, q, lengths=[9] * world)
    expect(TypeError, "lengths[0] must be an integer", q, q, q, lengths=[8.0] * world)
    expect(ValueError, "the same tokens", q, q[:, :, :4], q[:, :, :4])
    expect(ValueError, "ranks cannot share", q[:, :1], q[:, :1], q[:, :1])
    wrong = torch.ones(1, 4, 1, 1, dtype=torch.int32)
    expect(ValueError, "levels must be", q, q, q, levels=wrong)
    expect(TypeError, "nonsense", q, q, q, nonsense=1)
    wide = q.double()  # which no kernel takes
    expect(ValueError, "triton", wide, wide, wide, implementation="triton")
    expect(ValueError, "grid", q, q, q, rearrange_method="Gilbert", grid=(2, 2, 3))
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ulysses", "other"))
    expect(ValueError, "one dimension", q, q, q, group=mesh)
    torch.testing.assert_close(
        call(q, q, q, group=mesh["ulysses"], block_n=32),
        call(q, q, q, group=dist.group.WORLD, block_n=32),
    )


def alone(rank, world):
    """A group of one is the plain call and exchanges nothing."""
    groups = [dist.new_group([member]) for member in range(world)]
    q = torch.randn(1, 2, 300, 16)
    with Counted().counting() as counted:
        got = distributed.psa_attention(q, q, q, group=groups[rank])
    assert counted.calls == 0 and torch.equal(got, psa_torch.psa_attention(q, q, q))
    pair = q.repeat(2, 1, 1, 1)
    levels = torch.ones(2, 2, 3, 5, dtype=torch.int32)
    got = distributed.psa_attention(pair, pair, pair, group=groups[rank], levels=levels)
    assert torch.equal(got, psa_torch.psa_attention(pair, pair, pair, levels=levels))


def levels_of_the_caller(rank, world):
    """Those that a call returned give its output again."""
    generator = torch.Generator().manual_seed(rank)
    mine = [torch.randn(1, 2 * world, 300, 16, generator=generator) for _ in range(3)]
    out, levels = distributed.psa_attention(*mine, group=dist.group.WORLD, return_levels=True)
    assert levels.shape[:2] == (1, 2)
    again = distributed.psa_attention(*mine, group=dist.group.WORLD, levels=levels)
    assert torch.equal(again, out)


def autocast(rank, world):
    """What travels has the dtype of autocast: half the bytes, and the result of the plain call."""
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn(1, world, 256 * world, 16, generator=generator) for _ in range(3)]
    mine = [x.chunk(world, 2)[rank] for x in whole]
    with torch.autocast("cpu", torch.bfloat16), Counted().counting() as counted:
        got = distributed.psa_attention(*mine, group=dist.group.WORLD)
        want = psa_torch.psa_attention(*whole).chunk(world, 2)[rank]
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)
    assert counted.bytes == 4 * (world - 1) * 256 * 16 * 2


def compiled(rank, world):
    """One graph, the exchange in it, forward and backward."""
    generator = torch.Generator().manual_seed(rank)
    mine = [torch.randn(1, world, 300, 16, generator=generator).requires_grad_() for _ in range(3)]

    def call(*inputs):
        return distributed.psa_attention(*inputs, group=dist.group.WORLD)

    def both(function):
        out = function(*mine)
        return out, *torch.autograd.grad(out.square().sum(), mine)

    whole_graph = torch.compile(call, backend="aot_eager", fullgraph=True)
    for got, want in zip(both(whole_graph), both(call), strict=True):
        assert torch.equal(got, want)


def swapped_shards_are_noticed(rank, world):
    """The control: shards in another order than the ranks' give another result."""
    torch.manual_seed(0)
    whole = [torch.randn(1, world, 256 * world, 16) for _ in range(3)]
    want = psa_torch.psa_attention(*whole).chunk(world, 2)
    for shift, same in ((0, True), (1, False)):
        mine = [x.chunk(world, 2)[(rank + shift) % world] for x in whole]
        got = distributed.psa_attention(*mine, group=dist.group.WORLD)
        assert torch.allclose(got, want[rank], atol=1e-5) == same


def main(rank: int, world: int, store: str) -> None:
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    for name in CASES:
        check(name, rank, world)
    refuse(rank, world)
    alone(rank, world)
    levels_of_the_caller(rank, world)
    autocast(rank, world)
    compiled(rank, world)
    swapped_shards_are_noticed(rank, world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
