"""Tiny LTX: a small trained model of LTXV architecture with a codec in place of the VAE, for tests and demos."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """Entry point of the V3 node pack; imports ComfyUI only when ComfyUI asks for it."""
    from .nodes import TinyLTXExtension

    return TinyLTXExtension()
