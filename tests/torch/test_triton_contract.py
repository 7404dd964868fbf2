"""The `triton` implementation keeps the contract of every implementation of attention."""

from tests.torch.attention_contract import AttentionContract


class TestTriton(AttentionContract):
    implementation = "triton"
