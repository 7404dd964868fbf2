"""Levels and orders of clusters that are kept for some steps, inside real models."""

import dataclasses

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from models import SPARSE, WAN, build, perturbed, times, video  # noqa: E402

from psa_torch.integrations.diffusers import FAMILIES, apply  # noqa: E402

CLUSTERS = dataclasses.replace(SPARSE, rearrange_method="Clusters")


def run(model, arguments, keywords):
    with torch.no_grad():
        return model(*arguments, **keywords).sample


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def other(arguments, name):
    """The arguments of a forward with other latents."""
    x = 3 * torch.randn_like(arguments[0])
    return (x, *arguments[1:])


@pytest.mark.parametrize("config", [SPARSE, CLUSTERS], ids=["Gilbert", "clusters"])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_the_step_that_chooses_is_as_ever_and_the_next_uses_its_choice(name, config):
    model, arguments, keywords = build(name)
    later = other(arguments, name)
    with apply(model, config=config):
        chosen, fresh = (run(model, call, keywords) for call in (arguments, later))
    with apply(model, config=config, refresh_every=2) as psa:
        psa.step = 4
        assert relative(run(model, arguments, keywords), chosen) < 1e-5
        psa.step = 5
        kept = run(model, later, keywords)
        assert relative(kept, fresh) > 1e-4  # the choice of step 4
        psa.step = 4
        assert relative(run(model, arguments, keywords), chosen) < 1e-5  # an earlier step
        psa.reset()
        psa.step = 5
        assert relative(run(model, later, keywords), fresh) < 1e-5


def test_branches_of_guidance_keep_their_own():
    model, arguments, keywords = build("wan")
    calls = arguments, other(arguments, "wan")
    with apply(model, config=SPARSE):
        expected = [run(model, call, keywords) for call in calls]
    with apply(model, config=SPARSE, refresh_every=3) as psa:
        for psa.step in range(3):
            for call, out in zip(calls, expected, strict=True):
                assert relative(run(model, call, keywords), out) < 1e-5


def test_dense_steps_and_records():
    model, arguments, keywords = build("wan")
    later = other(arguments, "wan")
    with apply(model, config=SPARSE):
        fresh = run(model, later, keywords)
    with apply(model, config=SPARSE, refresh_every=4, warmup_steps=1, record=True) as psa:
        for psa.step in (1, 2):
            run(model, arguments, keywords)
        assert {r.step for r in psa.records.read()} == {1, 2}
        assert {r.layer for r in psa.records.read()} == {"blocks.0.attn1", "blocks.1.attn1"}
        psa.step = 0  # another video: what was kept goes
        run(model, arguments, keywords)
        psa.step = 3
        assert relative(run(model, later, keywords), fresh) < 1e-5
        assert len(list(psa.records.read())) == 3 * 2 * 2


def test_graphs_stay_two():
    from torch._dynamo.utils import counters

    model = perturbed(diffusers.WanTransformer3DModel(**{**WAN, "num_layers": 4}))
    arguments = (video(1), times(1), torch.randn(1, 7, 16))
    with apply(model, config=SPARSE, refresh_every=2, warmup_steps=1) as psa:
        expected = []
        for psa.step in range(4):
            expected.append(run(model, arguments, {}))
        psa.reset()
        torch._dynamo.reset()
        counters.clear()
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        for psa.step in range(4):
            assert relative(run(model, arguments, {}), expected[psa.step]) < 1e-4
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_what_does_not_go_together_is_refused():
    model, arguments, keywords = build("wan")
    with pytest.raises(ValueError, match="refresh_every must be at least 1"):
        apply(model, config=SPARSE, refresh_every=0)
    with apply(model, config=SPARSE, refresh_every=2) as psa:
        with pytest.raises(RuntimeError, match="step is not known.* refresh_every=2"):
            run(model, arguments, keywords)
        psa.step = 0
        with pytest.raises(RuntimeError, match="more than 8 forwards at step 0"):
            for _ in range(9):
                run(model, arguments, keywords)
    with pytest.raises(ValueError, match="refresh_every must be 1 for HunyuanVideoTransformer"):
        apply(build("hunyuanvideo")[0], config=SPARSE, refresh_every=2)
    untold = dataclasses.replace(FAMILIES["wan"], text=lambda model, arguments: None)
    with apply(model, config=SPARSE, refresh_every=2, family=untold) as psa:
        psa.step = 0
        with pytest.raises(RuntimeError, match="needs the number of text tokens"):
            run(model, arguments, keywords)
