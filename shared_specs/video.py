"""What the video attention modules of both frameworks decide alike."""

from shared_specs.config import PSAConfig


def require_step(warmup_steps: int) -> None:
    """Refuse a call without a step where the step decides between dense and sparse.

    Raises:
        ValueError: there are warm-up steps.
    """
    if warmup_steps:
        raise ValueError(
            f"step must be given with warmup_steps={warmup_steps}; got None, and the number of "
            "calls says nothing about the step"
        )


def is_cross_attention(q_len: int, kv_len: int, config: PSAConfig, stated: bool) -> bool:
    """Whether a call is cross-attention, which stays dense.

    It is where the caller says so, and where keys and queries differ in number; but causal calls
    with more keys than queries look at their own past.
    """
    return stated or (q_len != kv_len and not config.causal)
