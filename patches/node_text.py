"""A line of text at the node that is being executed, where ComfyUI can show one."""

from __future__ import annotations

import sys
from typing import Any

try:
    from comfy_execution.utils import get_executing_context
except ImportError:  # Trees without a server.
    get_executing_context = None


class NodeText:
    """Of the node that is executed where this is made; other threads may use it."""

    def __init__(self) -> None:
        context = None if get_executing_context is None else get_executing_context()
        self._node = None if context is None else context.node_id
        self._shown = ""

    def show(self, text: str) -> None:
        # Not imported: where nobody has started a server there is nobody to show it to.
        server: Any = getattr(sys.modules.get("server"), "PromptServer", None)
        send = getattr(getattr(server, "instance", None), "send_progress_text", None)
        if send is None or self._node is None or text == self._shown:
            return
        self._shown = text
        send(text, self._node)
