"""Starting a kernel: the one place that says how all of them are compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

BLOCK, WARPGROUP = "block", "warpgroup"
"""Names of a kernel's axes: `lax.axis_index("block")` is the thread block."""


def scratch(cls: type) -> Any:
    """A frozen dataclass of shared memory and barriers, for `launch`.

    A field may be None, which takes nothing, or an instance of another such class. They are laid
    out in the order of their names.
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    names = sorted(field.name for field in dataclasses.fields(made))
    return jax.tree_util.register_dataclass(made, data_fields=names, meta_fields=[])


def launch(
    body: Callable[..., None],
    inputs: Any,
    *,
    out_type: Any,
    blocks: int,
    scratch: Any = None,
    warpgroups: int | None = None,
    rereads: bool = False,
    interpret: Any,
) -> Any:
    """Run a kernel.

    Args:
        body: called as `body(inputs, *outputs)` or, with scratch, as
            `body(inputs, *outputs, scratch)`: `inputs` and `scratch` as given here, with
            references in place of arrays and types. Its name is the kernel's.
        inputs: a tree of arrays.
        out_type: a `jax.ShapeDtypeStruct`, or a tuple of them.
        blocks: thread blocks, the axis "block".
        scratch: types of shared memory and barriers, an instance of a class made by `@scratch`.
        warpgroups: warpgroups of a thread block, the axis "warpgroup"; None for one without it.
        rereads: whether a warpgroup reads shared memory that it writes with ordinary stores.
            Where none does, the barriers that the compiler would put around every copy go.
        interpret: parameters of the interpreter, or None for the GPU.

    Returns:
        The outputs, as `out_type` has them.
    """
    arrays, tree = jax.tree.flatten(inputs)

    def kernel(*refs):
        body(tree.unflatten(refs[: len(arrays)]), *refs[len(arrays) :])

    kernel.__name__ = body.__name__  # which profilers show
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=() if scratch is None else (scratch,),
        grid=(blocks,),
        grid_names=(BLOCK,),
        num_threads=warpgroups,
        thread_name=None if warpgroups is None else WARPGROUP,
        compiler_params=_compiler_params(rereads),
        # jax 0.10 takes no None for "not interpreted".
        **({} if interpret is None else {"interpret": interpret}),
    )(*arrays)


def _compiler_params(rereads: bool) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        unsafe_no_auto_barriers=not rereads,
        # Rows are reduced inside a warp, never across warps.
        reduction_scratch_bytes=0,
    )
