"""Attention over a sequence whose tokens are spread over the ranks of a process group."""

from psa_torch.distributed.call import psa_attention
from psa_torch.distributed.exchange import to_heads, to_sequence
from shared_specs.head_plan import HeadPlan, head_plan

__all__ = ["HeadPlan", "head_plan", "psa_attention", "to_heads", "to_sequence"]
