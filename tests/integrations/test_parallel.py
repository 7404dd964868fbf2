"""diffusers' context parallelism, on two processes of one CPU: Ulysses with PSA, ring refused."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")

from models import LEVEL1, build  # noqa: E402

from psa_torch.integrations.diffusers import apply  # noqa: E402
from psa_torch.integrations.parallel import sharding  # noqa: E402


def test_no_processor_is_sharded_before_it_is_told_to():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    assert WanAttnProcessor()._parallel_config is None, "the attribute that parallel.py reads"
    assert sharding([WanAttnProcessor(), object()]) is None
    context = SimpleNamespace(ring_degree=None, ulysses_degree=2)
    processor = SimpleNamespace(_parallel_config=SimpleNamespace(context_parallel_config=context))
    assert sharding([object(), processor]) == (False, True)


@pytest.mark.parametrize(("ring", "words"), [(2, "ring attention"), (1, "Ulysses interleaves")])
def test_sharding_of_joined_text_and_rings_are_refused_by_name(ring, words):
    model, arguments, _ = build("hunyuanvideo")
    context = SimpleNamespace(ring_degree=ring, ulysses_degree=2)
    for processor in model.attn_processors.values():
        processor._parallel_config = SimpleNamespace(context_parallel_config=context)
    with apply(model, config=LEVEL1), pytest.raises(RuntimeError, match=words):
        model(*arguments)


def test_ulysses_gives_what_one_process_gives_and_a_real_ring_is_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = []
    for rank in "01":
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": rank,
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        }
        done.append(
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("parallel_worker.py")],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=240)[0] for process in done]
    finally:
        for process in done:
            process.kill()
    assert [process.returncode for process in done] == [0, 0], said
    assert "all checked" in said[0]
