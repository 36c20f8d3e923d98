"""What TensorBoard imports when it starts; an error here would keep it from starting at all, so there is little."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tensorboard.plugins import base_plugin

if TYPE_CHECKING:
    from lightning_gradhealth.tensorboard.plugin import GradHealthPlugin

SAMPLES = 2_000  # events of a tag: what a picture has columns for; a user's own --samples_per_plugin wins


class GradHealthLoader(base_plugin.TBLoader):  # type: ignore[misc]
    """Makes the plugin; TensorBoard finds it by its entry point.

    Example:
        >>> flags = argparse.Namespace(samples_per_plugin={"images": 5})
        >>> GradHealthLoader().fix_flags(flags)
        >>> flags.samples_per_plugin
        {'gradhealth': 2000, 'gradhealth_events': 0, 'images': 5}
    """

    def fix_flags(self, flags: argparse.Namespace) -> None:
        """Have more samples kept than TensorBoard does by default, and every finding."""
        theirs = getattr(flags, "samples_per_plugin", None) or {}
        flags.samples_per_plugin = {"gradhealth": SAMPLES, "gradhealth_events": 0, **theirs}

    def load(self, context: Any) -> GradHealthPlugin:
        """Make the plugin."""
        from lightning_gradhealth.tensorboard.plugin import GradHealthPlugin

        return GradHealthPlugin(context)
