"""One process of a group that splits heads between its members; run by test_distributed.py.

Usage: python heads_over_processes.py RANK WORLD STORE_FILE
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

from psa_torch import PSAAttention, PSAConfig

HEADS, KV_HEADS, LENGTH, DIM = 8, 4, 200, 32


def main(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    module = PSAAttention(PSAConfig(causal=True))
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(1, heads, LENGTH, DIM, generator=generator, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    dout = torch.randn(whole[0].shape, generator=generator)
    want = module(*whole)
    want_grads = torch.autograd.grad(want, whole, dout)
    over_a_process_group(module, whole, dout, want, want_grads, rank, world)
    over_a_mesh(module, whole, dout, want, want_grads, world)
    dist.destroy_process_group()


def over_a_process_group(module, whole, dout, want, want_grads, rank, world) -> None:
    """Each process takes its heads; the outputs are gathered."""
    mine = [x.detach().chunk(world, 1)[rank].requires_grad_() for x in whole]
    out = module(*mine)
    gathered = [torch.empty_like(out) for _ in range(world)]
    dist.all_gather(gathered, out.detach().contiguous())
    assert torch.equal(torch.cat(gathered, 1), want)
    grads = torch.autograd.grad(out, mine, dout.chunk(world, 1)[rank])
    for got, full in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, full.chunk(world, 1)[rank])


def over_a_mesh(module, whole, dout, want, want_grads, world) -> None:
    """The same with DTensors: nothing is gathered before or inside attention."""
    mesh, heads = init_device_mesh("cpu", (world,)), [Shard(1)]
    attend = local_map(module, out_placements=heads, in_placements=(heads,) * 3)
    shards = [
        distribute_tensor(x.detach(), mesh, heads, src_data_rank=None).requires_grad_()
        for x in whole
    ]
    out = attend(*shards)
    assert out.placements == tuple(heads) and out.to_local().shape[1] == HEADS // world
    assert torch.equal(out.full_tensor(), want)
    grads = torch.autograd.grad(out, shards, distribute_tensor(dout, mesh, heads))
    for got, full in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got.full_tensor(), full)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
