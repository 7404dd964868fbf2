"""Order and levels that the attentions of one transformer keep for some steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from psa_torch.integrations.intercept import Layer
from psa_torch.video import DensityLog, PSAVideoAttention, VideoState
from shared_specs.config import PSAConfig

MOST_FORWARDS = 8
"""Most forwards of one step; more mean that the step does not advance."""


class Memory:
    """The step and the branch of guidance of the present forward, for all attentions.

    Pipelines run the branches of guidance as forwards of one step, always in the same order, and
    name them nowhere in public: the n-th forward of a step is branch n.
    """

    def __init__(self, layers: Sequence[Layer], refresh_every: int) -> None:
        self._state = VideoState(records=_Unread())
        self._forwards = 0
        self._ordered: bool | None = None
        self._videos: list[PSAVideoAttention] = []
        for layer in layers:
            layer.video = video = PSAVideoAttention(
                refresh_every=refresh_every, layer=layer.name, state=self._state
            )
            self._videos.append(video)

    def begin(self, step: int, config: PSAConfig | None, records: DensityLog | None) -> None:
        """A forward of `step` starts.

        Args:
            step: the denoising step.
            config: of its attentions.
            records: where densities are noted, if they are.

        Raises:
            RuntimeError: it is one forward of this step too many, or only its calls tell how much
                text they attend over.
        """
        if config is None:
            raise RuntimeError("refresh_every needs the number of text tokens before the calls")
        ordered = config.rearrange_method is None
        if ordered != self._ordered:
            self.forget()  # blocks are of tokens in another order
        self._ordered = ordered
        self._forwards = self._forwards + 1 if self._forwards and step == self._state.step else 1
        if self._forwards > MOST_FORWARDS:
            raise RuntimeError(
                f"more than {MOST_FORWARDS} forwards at step {step}: with refresh_every the step "
                "has to advance; set psa.step, and psa.reset() before another video"
            )
        self._state.step = step
        self._state.branch = str(self._forwards - 1)
        self._state.records = _Unread() if records is None else records
        for video in self._videos:
            video.config = config

    def forget(self) -> None:
        """Before another video, and in dense steps."""
        self._forwards = 0
        for video in self._videos:
            video.reset()


class _Unread(DensityLog):
    """Keeps nothing."""

    def append(self, layer: str, step: int, density: Tensor) -> None:
        """Nothing is noted."""
