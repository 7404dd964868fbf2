"""PyTorch's FlexAttention behind the conformance suite: block masks are levels 0 and 1.

psa conformance run docs/examples/flex_attention_adapter.py
"""

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from shared_specs.conformance import Adapter


class FlexAttentionAdapter(Adapter):
    name = "FlexAttention, levels 0 and 1"

    def capabilities(self):
        return {
            "levels": {0, 1},
            "mask_form": {"dense"},
            "dtype": {"float32", "float16", "bfloat16"},
            "empty_rows": {False},
        }

    def forward(self, q, k, v, levels, *, block_m, block_n, scale, is_causal, dtype):
        q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (q, k, v))
        keep = torch.from_numpy(levels) == 1
        offset = k.shape[2] - q.shape[2]

        def mask_mod(b, h, row, col):
            visible = keep[b, h, row // block_m, col // block_n]
            return visible & (col <= row + offset) if is_causal else visible

        mask = create_block_mask(mask_mod, *q.shape[:3], k.shape[2], device="cpu")
        grouped = q.shape[1] != k.shape[1]
        out, aux = flex_attention(
            q,
            k,
            v,
            block_mask=mask,
            scale=scale,
            enable_gqa=grouped,
            return_aux=AuxRequest(lse=True),
        )
        return out.double().numpy(), aux.lse.double().numpy()


adapter = FlexAttentionAdapter()
