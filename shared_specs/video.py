"""What the video attention modules of both frameworks decide alike."""

from shared_specs.config import PSAConfig


def require_step(*, warmup_steps: int, refresh_every: int) -> None:
    """Refuse a call without a step where the step decides what is done.

    Raises:
        ValueError: there are warm-up steps, or steps that keep what another one chose.
    """
    reasons = []
    if warmup_steps:
        reasons.append(f"warmup_steps={warmup_steps}")
    if refresh_every > 1:
        reasons.append(f"refresh_every={refresh_every}")
    if reasons:
        raise ValueError(
            f"step must be given with {' and '.join(reasons)}; got None, and the number of calls "
            "says nothing about the step"
        )


def is_cross_attention(q_len: int, kv_len: int, config: PSAConfig, stated: bool) -> bool:
    """Whether a call is cross-attention, which stays dense.

    It is where the caller says so, and where keys and queries differ in number; but causal calls
    with more keys than queries look at their own past.
    """
    return stated or (q_len != kv_len and not config.causal)
