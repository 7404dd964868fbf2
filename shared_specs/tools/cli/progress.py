"""A progress bar on stderr where rich is installed; nothing, rather than noise, where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def track(items: Sequence, description: str) -> Iterable:
    """Iterate over `items`, showing how far it has come."""
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        return items
    return rich_track(items, description=description, console=Console(stderr=True))
