"""PSAVideoAttention with budgets by step."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from psa_torch import PSAVideoAttention, VideoState, psa_attention
from shared_specs import PSAConfig

CONFIG = PSAConfig(
    rearrange_method="Gilbert", grid=(4, 8, 12), importance="defect", mask_mode="budget",
    budget=0.6, block_m=64, block_n=32,
)  # fmt: skip
SCHEDULE = {4: 0.4, 8: 0.2}
RATIOS = {2: {1: (0.0, 0.6)}, 4: {1: (0.0, 0.2), 8: (0.2, 0.5)}}


def make_qkv(rng):
    return [torch.from_numpy(rng.normal(size=(1, 2, 384, 16))).float() for _ in range(3)]


def budget_at(step):
    return 0.6 if step < 4 else 0.4 if step < 8 else 0.2


@pytest.mark.parametrize("by_state", [False, True])
def test_each_step_has_the_budget_of_its_phase(rng, by_state):
    state = VideoState()
    layer = PSAVideoAttention(
        CONFIG, warmup_steps=2, schedule=SCHEDULE, state=state if by_state else None
    )
    qkv = make_qkv(rng)
    for step in range(2, 11):
        state.step = step
        out = layer(*qkv) if by_state else layer(*qkv, step=step)
        config = dataclasses.replace(CONFIG, budget=budget_at(step))
        assert torch.equal(out, psa_attention(*qkv, config=config))
    if by_state:
        means = {}
        for record in state.records.read():
            means.setdefault(record.step, []).append(record.density)
        means = {step: sum(found) / len(found) for step, found in means.items()}
        assert means[2] == means[3] > means[4] == means[7] > means[8] == means[10]


def test_ratios_by_step(rng):
    config = PSAConfig(block_m=64, block_n=32)
    layer = PSAVideoAttention(config, schedule=RATIOS)
    qkv = make_qkv(rng)
    for step, ratios in ((1, config.mask_ratios), (2, RATIOS[2]), (5, RATIOS[4])):
        expected = psa_attention(*qkv, config=config, mask_ratios=ratios)
        assert torch.equal(layer(*qkv, step=step), expected)


def test_kept_levels_end_with_their_phase(rng):
    layer = PSAVideoAttention(CONFIG, refresh_every=5, schedule={2: 0.2})
    steps = [make_qkv(rng) for _ in range(3)]
    outputs = [layer(*qkv, step=step) for step, qkv in enumerate(steps)]
    assert not torch.equal(outputs[1], psa_attention(*steps[1], config=CONFIG))  # kept
    assert torch.equal(outputs[2], psa_attention(*steps[2], config=CONFIG, budget=0.2))


def test_a_bad_schedule_and_a_missing_step_are_refused(rng):
    with pytest.raises(ValueError, match="schedule must have at least one phase"):
        PSAVideoAttention(CONFIG, schedule={})
    with pytest.raises(TypeError, match="schedule must be None or map"):
        PSAVideoAttention(CONFIG, schedule=[0.5])
    with pytest.raises(ValueError, match="step must be given with a schedule of 3 phases"):
        PSAVideoAttention(CONFIG, schedule=SCHEDULE)(*make_qkv(rng))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.to_qkv, self.attention = nn.Linear(32, 96), attention

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        return x + self.attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("repeated_blocks", [False, True])
def test_a_phase_is_one_graph(rng, repeated_blocks):
    torch.manual_seed(int(rng.integers(2**31)))
    state = VideoState()
    model = nn.Sequential(
        *(
            Block(
                PSAVideoAttention(
                    CONFIG, warmup_steps=2, schedule=SCHEDULE, refresh_every=2, state=state
                )
            )
            for _ in range(4)
        )
    )
    inputs = [torch.from_numpy(rng.normal(size=(1, 384, 32))).float() for _ in range(12)]

    def run():
        for block in model:
            block.attention.reset()
        with torch.no_grad():
            outputs = []
            for state.step in range(12):
                outputs.append(model(inputs[state.step]))
        return outputs

    wanted = run()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for module in model if repeated_blocks else [model]:
        module.compile(backend=counter, fullgraph=True)
    found = run()
    assert counter.frame_count == 1 + 3  # warm-up, and the phases
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
