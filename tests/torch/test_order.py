"""psa_torch.order against the NumPy specification; gradients, compilation, determinism, memory."""

import numpy as np
import pytest
import torch

from psa_torch import order as order_module
from psa_torch.order import Centroids, TokenOrder, kmeans, permute
from shared_specs import PSAConfig
from shared_specs import order as spec
from shared_specs.order import clustering

METHODS = ("Gilbert", "STA", "Clusters", "SemanticAware", "Hybrid")
GRID, TEXT = (4, 8, 9), 7
LENGTH = 4 * 8 * 9 + TEXT


def config_of(method, **fields):
    return PSAConfig(
        rearrange_method=method, grid=GRID, tile_size=(2, 2, 4), text_length=TEXT, **fields
    )


def make_qkv(rng, length=LENGTH, heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    return tuple(
        torch.from_numpy(rng.normal(size=(2, count, length, dim))).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("position", ["start", "end"])
@pytest.mark.parametrize("method", [None, *METHODS])
def test_moves_equal_the_specification(rng, method, position):
    config = config_of(method, text_position=position)
    qkv = make_qkv(rng)
    order = TokenOrder.from_config(config, LENGTH, LENGTH)
    *moved, state = order.apply(*qkv)
    reference = spec.TokenOrder.from_config(config, LENGTH, LENGTH)
    *expected, _ = reference.apply(*(x.numpy() for x in qkv))
    for ours, theirs in zip(moved, expected, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)
    assert torch.equal(order.undo(moved[0], state), qkv[0])
    assert torch.equal(order.undo(moved[0][..., 0], state), qkv[0][..., 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact_in_every_dtype(rng, method, dtype):
    qkv = make_qkv(rng, dtype=dtype)
    order = TokenOrder.from_config(config_of(method), LENGTH, LENGTH)
    moved, *_, state = order.apply(*qkv)
    assert moved.dtype == dtype and moved.is_contiguous()
    assert torch.equal(order.undo(moved, state), qkv[0])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow_through_the_moves_only(rng, method):
    qkv = [x.requires_grad_() for x in make_qkv(rng)]
    order = TokenOrder.from_config(config_of(method), LENGTH, LENGTH)
    *moved, state = order.apply(*qkv)
    assert state.centroids.keys is None or not state.centroids.keys.requires_grad
    weights = [torch.randn_like(x) for x in moved]
    grads = torch.autograd.grad(moved, qkv, weights, retain_graph=True)

    def values_with(x, y):
        return set(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))

    for x, grad, after, weight in zip(qkv, grads, moved, weights, strict=True):
        assert values_with(x, grad) == values_with(after, weight)
    (there_and_back,) = torch.autograd.grad(order.undo(moved[0], state), qkv[0], weights[0])
    assert torch.equal(there_and_back, weights[0])


def test_permute_takes_first_and_second_derivatives(rng):
    x = torch.from_numpy(rng.normal(size=(1, 2, 6, 3))).requires_grad_()
    shared = torch.from_numpy(rng.permutation(6).astype(np.int32))
    per_head = torch.from_numpy(np.stack([rng.permutation(6) for _ in range(2)])[None]).int()
    for order in (shared, per_head, per_head[:, :1]):  # the last: one for a group of heads
        arguments = (x, order, order.argsort(-1).int())
        assert torch.autograd.gradcheck(permute, arguments)
        assert torch.autograd.gradgradcheck(permute, arguments)
        torch.library.opcheck(order_module._permute, arguments)


def test_moving_three_is_moving_each(rng):
    q, k, v = (torch.from_numpy(rng.normal(size=(1, h, 6, 2))).requires_grad_() for h in (4, 2, 2))
    q_order = torch.from_numpy(rng.permutation(6).astype(np.int32))
    kv_order = torch.from_numpy(np.stack([rng.permutation(6) for _ in range(2)])[None]).int()
    orders = (q_order, q_order.argsort().int(), kv_order, kv_order.argsort(-1).int())
    torch.library.opcheck(order_module._move, (q, k, v, *orders))
    assert torch.autograd.gradcheck(lambda *x: order_module._move(*x, *orders), (q, k, v))
    found = order_module._move(q, k, v, *orders)
    for x, y, order in zip((q, k, v), found, (q_order, kv_order, kv_order), strict=True):
        assert torch.equal(y, permute(x, order, order.argsort(-1).int()))


def test_the_other_operators_pass_opcheck(rng):
    tokens = torch.from_numpy(rng.normal(size=(1, 2, 60, 8))).float()
    start = tokens[:, :, :4].clone()
    order = torch.from_numpy(rng.permutation(60).astype(np.int32))
    for centroids in (None, start):
        torch.library.opcheck(order_module._kmeans, (tokens, 4, centroids, order))
    labels = torch.from_numpy(rng.integers(0, 5, (1, 2, 50)).astype(np.int32))
    for curve in (None, torch.from_numpy(rng.permutation(50).astype(np.int32))):
        torch.library.opcheck(order_module._cluster_order, (labels, curve, 5, 3, 60))
    arguments = (tokens, "STA", 60, [3, 4, 5], [2, 2, 2], 0, "end")
    torch.library.opcheck(order_module._fixed_order, arguments)


@pytest.mark.parametrize("method", METHODS)
def test_compiles_in_one_graph_with_gradients(rng, method):
    order = TokenOrder.from_config(config_of(method), LENGTH, LENGTH)

    def call(q, k, v):
        *moved, state = order.apply(q, k, v)
        return order.undo(moved[0].sin() * moved[1].sum() * moved[2].mean(), state)

    qkv = [x.requires_grad_() for x in make_qkv(rng)]
    torch._dynamo.reset()
    expected = call(*qkv)
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*qkv)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, qkv, weight),
        torch.autograd.grad(expected, qkv, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_runs_under_vmap(rng, method):
    order = TokenOrder.from_config(config_of(method), LENGTH, LENGTH)
    qkv = make_qkv(rng)

    def call(q, k, v):
        *moved, state = order.apply(q, k, v)
        return *moved, order.undo(moved[0], state)

    mapped = torch.vmap(call)(*(torch.stack([x, x.flip(2)]) for x in qkv))
    for place, tensors in enumerate((qkv, [x.flip(2) for x in qkv])):
        for ours, theirs in zip(mapped, call(*tensors), strict=True):
            assert torch.equal(ours[place], theirs)


def test_labels_equal_the_specification_from_equal_centroids(rng):
    tokens = rng.normal(size=(1, 2, 3000, 32)).astype(np.float32) + 20
    centroids = tokens[:, :, clustering.evenly_spaced(3000, 100)]
    found, _ = order_module._lloyd_step(
        torch.from_numpy(tokens), torch.from_numpy(centroids), move=False
    )
    expected = clustering.assign(tokens, centroids)
    assert found.dtype == torch.int32
    assert np.mean(found.numpy() == expected) >= 0.999
    _, moved = order_module._lloyd_step(
        torch.from_numpy(tokens), torch.from_numpy(centroids), move=True
    )
    wanted = clustering.update(tokens, expected, centroids)
    same = np.all(found.numpy() == expected)
    assert np.mean(np.abs(moved.numpy() - wanted) < 1e-4) >= (1 if same else 0.99)


@pytest.mark.parametrize("warm", [False, True])
def test_kmeans_follows_the_specification(rng, warm):
    tokens = rng.normal(size=(2, 2, 700, 16)).astype(np.float32)
    start = rng.normal(size=(2, 2, 20, 16)).astype(np.float32) if warm else None
    labels, centroids = kmeans(
        torch.from_numpy(tokens), 20, centroids=torch.from_numpy(start) if warm else None
    )
    wanted_labels, wanted = clustering.kmeans(tokens, 20, centroids=start)
    assert np.mean(labels.numpy() == wanted_labels) >= 0.999
    np.testing.assert_allclose(centroids.numpy(), wanted, atol=2e-3)


def test_ties_and_empty_centroids():
    tokens = torch.zeros(1, 1, 3, 2)
    centroids = torch.tensor([[[[2.0, 0], [0, 1], [0, -1], [1, 0]]]])
    labels, moved = order_module._lloyd_step(tokens, centroids, move=True)
    assert labels.tolist() == [[[1, 1, 1]]]
    expected = centroids.clone()
    expected[0, 0, 1] = 0
    torch.testing.assert_close(moved, expected)


def test_kmeans_repeats_itself_bit_for_bit(rng):
    tokens = torch.from_numpy(rng.normal(size=(1, 2, 900, 16))).float()
    first, second = kmeans(tokens, 25), kmeans(tokens.clone(), 25)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_distances_are_bounded_whatever_the_length(rng, monkeypatch):
    tokens = torch.from_numpy(rng.normal(size=(1, 3, 500, 8))).float()
    whole, _ = kmeans(tokens, 10)
    limit = 3 * 10 * 64
    monkeypatch.setitem(order_module.DISTANCE_ELEMENTS, "cpu", limit)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        chunked, _ = order_module._lloyd_step(tokens, tokens[:, :, :10].contiguous(), move=True)
    assert limit <= largest <= max(limit, tokens.numel())
    chunked, _ = kmeans(tokens, 10)
    assert (chunked == whole).float().mean() >= 0.999


def test_kmeans_ignores_autocast(rng):
    tokens = torch.from_numpy(rng.normal(size=(1, 1, 400, 32))).float()
    expected = kmeans(tokens, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kmeans(tokens, 12)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_warm_start_is_used_and_checked(rng):
    q, k, v = make_qkv(rng)
    order = TokenOrder.from_config(config_of("SemanticAware"), LENGTH, LENGTH)
    *_, first = order.apply(q, k, v)
    *_, second = order.apply(q, k, v, centroids=first.centroids)
    video_k = k[:, :, : LENGTH - TEXT]
    expected = kmeans(video_k, order.key_centroids, centroids=first.centroids.keys)[1]
    assert torch.equal(second.centroids.keys, expected)
    assert not torch.equal(second.centroids.keys, first.centroids.keys)
    with pytest.raises(ValueError, match="centroids of an earlier call must have shape"):
        order.apply(q, k, v, centroids=Centroids(None, first.centroids.keys[:, :1]))
