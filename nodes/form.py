"""Inputs of a node from the settings of its technique, which say ranges and defaults."""

from typing import Any

from comfy_api.latest import io

from ..patches.settings import Choice, Setting, Whole


def field(
    settings: dict[str, Setting] | Any,
    name: str,
    tooltip: str,
    advanced: bool = False,
    optional: bool = False,
) -> Any:
    """The input for one of `settings`. advanced: folded away in the frontend."""
    setting = settings[name]
    more: dict[str, Any] = {"default": setting.default, "tooltip": tooltip, "optional": optional}
    if advanced:
        more["extra_dict"] = {"advanced": True}
    if isinstance(setting, Choice):
        return io.Combo.Input(name, options=list(setting.options), **more)
    if isinstance(setting, Whole):
        # Without a step of its own a form counts by ones, and says nothing of it.
        steps = {"step": setting.step} if setting.step > 1 else {}
        return io.Int.Input(name, min=setting.low, max=setting.high, **steps, **more)
    return io.Float.Input(name, min=setting.low, max=setting.high, step=setting.step, **more)
