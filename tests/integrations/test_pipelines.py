"""Real pipelines with tiny random transformers, run offline on embeddings and latents."""

import copy
import tempfile

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from models import COG, LEVEL1, SPARSE, WAN, build, perturbed, video  # noqa: E402

from psa_torch.integrations.diffusers import apply  # noqa: E402

STEPS = 4
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def wan(scheduler="UniPCMultistepScheduler", experts=1):
    keywords = FLOW if scheduler.startswith("UniPC") else {"shift": 3.0}
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=getattr(diffusers, scheduler)(**keywords),
        transformer=perturbed(diffusers.WanTransformer3DModel(**WAN)),
        transformer_2=perturbed(diffusers.WanTransformer3DModel(**WAN)) if experts > 1 else None,
        boundary_ratio=0.875 if experts > 1 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cogvideox(scheduler):
    keywords = {"snr_shift_scale": 1.0} if scheduler.startswith("CogVideoX") else {}
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=perturbed(diffusers.CogVideoXTransformer3DModel(**COG)),
        scheduler=getattr(diffusers, scheduler)(prediction_type="v_prediction", **keywords),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(length=10):
    torch.manual_seed(1)
    return {
        "prompt_embeds": torch.randn(1, length, 16),
        "negative_prompt_embeds": torch.randn(1, length, 16),
    }


def frames(pipe, height=128, width=192, num_frames=17, **arguments):
    return pipe(
        **prompts(),
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **arguments,
    ).frames


def steps_recorded(psa):
    return sorted({record.step for record in psa.records.read()})


@pytest.mark.parametrize(
    "scheduler", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_wan_with_guidance_as_two_calls(scheduler):
    pipe = wan(scheduler)
    dense = frames(pipe)
    with apply(pipe, config=LEVEL1, warmup_steps=1):
        assert relative(frames(pipe), dense) < 1e-4
    with apply(pipe, config=SPARSE, warmup_steps=2, record=True) as psa:
        outputs = [frames(pipe) for _ in range(2)]
        assert torch.equal(*outputs) and relative(outputs[0], dense) > 1e-4
        assert all(
            layer.calls == {"dense step": 2 * 2 * 2, "sparse": 2 * 2 * 2} for layer in psa.layers
        )
        assert steps_recorded(psa) == [2, 3]
        # Both branches of both videos, each layer, each head.
        assert len(list(psa.records.read())) == 2 * 2 * 2 * 2 * 2
    assert torch.equal(frames(pipe), dense)


@pytest.mark.parametrize(
    "scheduler",
    ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DPMSolverMultistepScheduler"],
)
def test_cogvideox_with_guidance_as_a_batch_and_a_scheduler_with_and_without_step_index(scheduler):
    pipe = cogvideox(scheduler)
    assert hasattr(pipe.scheduler, "step_index") == (not scheduler.startswith("CogVideoX"))
    dense = frames(pipe)
    with apply(pipe, config=LEVEL1, warmup_steps=1):
        assert relative(frames(pipe), dense) < 1e-4
    with apply(pipe, config=SPARSE, warmup_steps=3, record=True) as psa:
        frames(pipe)
        assert all(layer.calls == {"dense step": 3, "sparse": 1} for layer in psa.layers)
        assert steps_recorded(psa) == [3]


def test_two_experts_share_the_steps_of_one_schedule():
    pipe = wan(experts=2)
    dense = frames(pipe)
    with apply(pipe, config=LEVEL1):
        assert relative(frames(pipe), dense) < 1e-4
    with apply(pipe, config=SPARSE, warmup_steps=2) as psa:
        frames(pipe)
        high, low = psa.layers[0].calls, psa.layers[-1].calls
        assert len(psa.layers) == 4 and high["dense step"] + low["dense step"] == 2 * 2
        assert high["sparse"] + low["sparse"] == 2 * (STEPS - 2) and low["sparse"]


def test_the_callback_tells_the_step_to_a_bare_transformer():
    pipe = wan()
    with apply(pipe, config=SPARSE, warmup_steps=3) as psa:
        expected = frames(pipe)
    with apply(pipe.transformer, config=SPARSE, warmup_steps=3) as psa:
        psa.step = 0
        for _ in range(2):
            out = frames(pipe, callback_on_step_end=psa.on_step_end)
            assert torch.equal(out, expected) and psa.step == 0


def test_a_schedule_that_starts_late_has_the_steps_of_its_places():
    pipe = wan()
    with apply(pipe, config=SPARSE, warmup_steps=2) as psa:
        pipe.scheduler.set_timesteps(STEPS)
        pipe.scheduler.set_begin_index(2)
        text, x = prompts()["prompt_embeds"], video(1)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps[2:]:
                out = pipe.transformer(x, t.expand(1), text).sample
                x = pipe.scheduler.step(out, t, x, return_dict=False)[0]
        assert psa.layers[0].calls == {"sparse": 2}


def test_two_video_sizes_in_one_pipeline():
    pipe = wan()
    sizes = ({}, {"height": 96, "width": 128, "num_frames": 9})
    dense = [frames(pipe, **size) for size in sizes]
    with apply(pipe, config=LEVEL1):
        for size, expected in zip(sizes, dense, strict=True):
            assert relative(frames(pipe, **size), expected) < 1e-4


def test_densities_need_a_step():
    model, arguments, _ = build("wan")
    with apply(model, config=SPARSE, record=True) as psa:
        with pytest.raises(RuntimeError, match="step is not known.* record=True"):
            model(*arguments)
        psa.step = 7
        model(*arguments)
        assert steps_recorded(psa) == [7]
    pipe = cogvideox("CogVideoXDDIMScheduler")
    pipe.scheduler.set_timesteps(3)
    model, arguments, keywords = build("cogvideox")
    pipe.transformer = model
    with apply(pipe, config=SPARSE, record=True), pytest.raises(RuntimeError, match="not known"):
        model(*arguments, **keywords)  # a timestep that the scheduler has not set


def test_a_checkpoint_records_a_call_once():
    model, arguments, _ = build("wan")
    model.train()
    model.enable_gradient_checkpointing()
    with apply(model, config=SPARSE, record=True) as psa:
        psa.step = 0
        for _ in range(2):
            model(*arguments).sample.sum().backward()
        assert [layer.calls["sparse"] for layer in psa.layers] == [2, 2]
        assert len(list(psa.records.read())) == 2 * 2 * 2


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_lora_and_its_scale(name):
    peft = pytest.importorskip("peft")
    model, arguments, keywords = build(name)

    def run(scale):
        with torch.no_grad():
            return model(*arguments, **keywords, attention_kwargs={"scale": scale}).sample

    targets = ["to_q", "to_k", "to_v"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    with apply(model, config=LEVEL1):  # an adapter that comes later replaces no processor
        model.add_adapter(config)
        ours = [run(scale) for scale in (1.0, 0.25)]
    dense = [run(scale) for scale in (1.0, 0.25)]
    assert relative(*dense) > 1e-4
    for a, b in zip(ours, dense, strict=True):
        assert relative(a, b) < 1e-5


def test_a_saved_pipeline_knows_nothing_of_psa():
    pipe = wan()
    dense = frames(pipe)
    with apply(pipe, config=SPARSE), tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        loaded = diffusers.WanPipeline.from_pretrained(
            folder, tokenizer=None, text_encoder=None, vae=None
        )
    loaded.set_progress_bar_config(disable=True)
    assert relative(frames(loaded), dense) < 1e-6
    assert not any(hasattr(p, "psa_layer") for p in loaded.transformer.attn_processors.values())


@pytest.mark.parametrize("name", ["wan", "mochi"])
def test_a_copy_has_psa_under_the_same_handle(name):
    model, arguments, keywords = build(name)

    def run(model):
        with torch.no_grad():
            return model(*arguments, **keywords).sample

    dense = run(model)
    with apply(model, config=SPARSE, warmup_steps=1) as psa:
        twin = copy.deepcopy(model)
        for psa.step in range(2):
            assert torch.equal(run(twin), run(model))
            assert torch.equal(run(model), dense) == (psa.step == 0)
    assert torch.equal(run(model), dense) and not torch.equal(run(twin), dense)
