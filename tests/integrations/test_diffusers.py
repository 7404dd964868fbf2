"""Pyramid sparse attention in real diffusers classes with tiny random weights."""

import inspect
import tempfile

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from models import LEVEL1, NAMES, SPARSE, WAN, build, perturbed, times, video  # noqa: E402

from psa_torch.integrations.diffusers import Family, apply  # noqa: E402


def run(model, arguments, keywords):
    with torch.no_grad():
        return model(*arguments, **keywords).sample


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def cast(x):
    return x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x


@pytest.mark.parametrize("name", NAMES)
def test_level_one_is_the_model_sparse_is_not_and_remove_is_exact(name):
    model, *call = build(name)
    dense = run(model, *call)
    with apply(model, config=LEVEL1) as psa:
        assert relative(run(model, *call), dense) < 1e-5
        assert all(layer.calls["sparse"] for layer in psa.layers), psa.table()
        assert all(set(layer.calls) == {"sparse"} for layer in psa.layers), psa.table()
    with apply(model, config=SPARSE, record=True) as psa:
        psa.step = 0
        out = run(model, *call)
        assert torch.isfinite(out).all() and relative(out, dense) > 1e-4
        assert all(0 < row.density < 1 for row in psa.records.read())
    assert torch.equal(run(model, *call), dense)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuanvideo", "ltx", "mochi"])
def test_bfloat16_errs_as_the_model_does(name):
    model, arguments, keywords = build(name)
    exact = run(model, arguments, keywords)
    model, arguments = model.bfloat16(), tuple(map(cast, arguments))
    dense = relative(run(model, arguments, keywords).float(), exact)
    with apply(model, config=LEVEL1):
        assert relative(run(model, arguments, keywords).float(), exact) < 2 * dense


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuanvideo"])
def test_a_processor_keeps_its_signature_and_class(name):
    model, *_ = build(name)
    before = {n: m.processor for n, m in model.named_modules() if hasattr(m, "processor")}
    with apply(model, config=LEVEL1) as psa:
        for layer in psa.layers:
            ours = model.get_submodule(layer.name).processor
            assert isinstance(ours, type(before[layer.name]))
            assert inspect.signature(ours.__call__) == inspect.signature(
                before[layer.name].__call__
            )


def test_rotary_embedding_reaches_the_processor():
    model, arguments, keywords = build("cogvideox")
    with apply(model, config=LEVEL1):
        other = {"image_rotary_emb": tuple(x.roll(1, 0) for x in keywords["image_rotary_emb"])}
        assert relative(run(model, arguments, other), run(model, arguments, keywords)) > 1e-4


def test_another_video_size_and_batch_follow_by_themselves():
    model, arguments, _ = build("wan")
    other = (video(1, 3, 20, 12), times(1), arguments[2][:1])
    dense = [run(model, call, {}) for call in (arguments, other)]
    with apply(model, config=LEVEL1):
        for call, expected in zip((arguments, other), dense, strict=True):
            assert relative(run(model, call, {}), expected) < 1e-5


def test_gradients_with_checkpointing():
    model, arguments, _ = build("wan")

    def gradients():
        model.zero_grad()
        model(*arguments).sample.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    model.train()
    expected = gradients()
    with apply(model, config=LEVEL1):
        model.enable_gradient_checkpointing()
        assert relative(gradients(), expected) < 1e-5


def test_saved_model_knows_nothing_of_psa():
    model, arguments, _ = build("wan")
    dense = run(model, arguments, {})
    with apply(model, config=SPARSE), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = diffusers.WanTransformer3DModel.from_pretrained(folder)
    assert torch.equal(run(loaded.eval(), arguments, {}), dense)


def test_warm_up_steps_and_dense_layers_are_dense():
    model, arguments, _ = build("wan")
    dense = run(model, arguments, {})
    with apply(model, config=SPARSE, warmup_steps=2) as psa:
        with pytest.raises(RuntimeError, match="step is not known"):
            run(model, arguments, {})
        for step in range(4):
            psa.step = step
            assert torch.equal(run(model, arguments, {}), dense) == (step < 2)
        assert psa.layers[0].calls == {"dense step": 2, "sparse": 2}
    with apply(model, config=SPARSE, dense_layers=[0, 1]) as psa:
        assert torch.equal(run(model, arguments, {}), dense)
        assert "dense layer" in psa.table()


@pytest.mark.parametrize(
    "scheduler", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_the_scheduler_of_a_pipeline_tells_the_step(scheduler):
    class Pipe:
        pass

    pipe = Pipe()
    pipe.transformer, arguments, _ = build("wan")
    keywords = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipe.scheduler = getattr(diffusers, scheduler)(**keywords if "UniPC" in scheduler else {})
    with apply(pipe, config=SPARSE, warmup_steps=2) as psa:
        for _ in range(2):  # two videos
            pipe.scheduler.set_timesteps(4)
            x = arguments[0]
            for t in pipe.scheduler.timesteps:
                for _ in range(2):  # guidance as two calls
                    out = run(pipe.transformer, (x, t.expand(2), arguments[2]), {})
                x = pipe.scheduler.step(out, t, x, return_dict=False)[0]
        assert psa.layers[0].calls == {"dense step": 8, "sparse": 8}


@pytest.mark.parametrize(("how", "layers"), [("blocks", 12), ("whole", 3)])
def test_two_graphs_for_all_layers_and_steps(how, layers):
    from torch._dynamo.utils import counters

    model = perturbed(diffusers.WanTransformer3DModel(**{**WAN, "num_layers": layers}))
    arguments = (video(1), times(1), torch.randn(1, 7, 16))
    torch._dynamo.reset()
    counters.clear()
    with apply(model, config=SPARSE, warmup_steps=2) as psa:
        psa.step = 0
        expected = []
        for psa.step in (0, 5):
            expected.append(run(model, arguments, {}))
        if how == "blocks":
            model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        compiled = model
        if how == "whole":
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for psa.step in range(12):
            out = run(compiled, arguments, {})
            assert relative(out, expected[psa.step >= 2]) < 1e-4
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["graph_break"]


def test_what_is_refused_says_what_to_do():
    model, arguments, _ = build("wan")
    with pytest.raises(ValueError, match="exactly one"):
        apply(model)
    with pytest.raises(ValueError, match="no family lists Linear"):
        apply(torch.nn.Linear(2, 2), config=LEVEL1)
    with pytest.raises(ValueError, match="dense_layers"):
        apply(model, config=LEVEL1, dense_layers=[2])
    wrong = Family((), lambda name: name.endswith("attn1"), lambda model, arguments: (5, 8, 11))
    with apply(model, config=LEVEL1, family=wrong), pytest.raises(ValueError, match="480 tokens"):
        run(model, arguments, {})
    with apply(model, config=LEVEL1) as psa:
        with pytest.raises(ValueError, match="applied to this model already"):
            apply(model, config=LEVEL1)
        processor = model.blocks[0].attn1.processor
        model.blocks[0].attn1.set_processor(type(processor).__mro__[1]())
        with pytest.raises(RuntimeError, match="was replaced"):
            run(model, arguments, {})
        model.blocks[0].attn1.set_processor(processor)
        psa.layers[0].owner.model.set_attention_backend("flex")
        with pytest.raises(RuntimeError, match="another attention backend"):
            run(model, arguments, {})
        model.set_attention_backend("native")
