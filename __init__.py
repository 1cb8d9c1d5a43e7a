"""FrameThrift: cheaper LTX-2 / LTX-Video sampling, as small nodes that compose."""

from comfy_api.latest import ComfyExtension, io

from .nodes import NODES

# Holds docs/NodeId.md, which ComfyUI shows as the help of a node; no JavaScript.
WEB_DIRECTORY = "docs"


class FrameThrift(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> FrameThrift:
    return FrameThrift()
