"""One of two processes of `test_parallel.py`; says 'all checked' where everything held."""

import torch
import torch.distributed as dist

torch.accelerator.device_count = lambda: 2  # 0 on a CPU, by which diffusers would divide

import diffusers  # noqa: E402
from models import LEVEL1, SPARSE, WAN, perturbed, times, video  # noqa: E402

from psa_torch.integrations.diffusers import apply  # noqa: E402

dist.init_process_group("gloo")
torch.manual_seed(0)


def run(model, arguments):
    with torch.no_grad():
        return model(*arguments, return_dict=False)[0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


model = perturbed(diffusers.WanTransformer3DModel(**WAN))
arguments = (video(1, 4), times(1), torch.randn(1, 8, 16))
dense = run(model, arguments)
with apply(model, config=SPARSE, order="layer"):
    sparse = run(model, arguments)
ring = perturbed(diffusers.WanTransformer3DModel(**WAN))
ring.enable_parallelism(config=diffusers.ContextParallelConfig(ring_degree=2))
with apply(ring, config=LEVEL1):
    try:
        run(ring, arguments)
    except RuntimeError as error:
        assert "ring attention" in str(error), error
    else:
        raise AssertionError("ring attention is not refused")

model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
with apply(model, config=LEVEL1) as psa:
    assert relative(run(model, arguments), dense) < 1e-5
    assert "inside each layer: the sequence is sharded" in psa.table()
with apply(model, config=SPARSE):
    assert relative(run(model, arguments), sparse) < 1e-6

print("all checked")
dist.destroy_process_group()
