"""What a device would be told to do, counted on the CPU."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

LOOKS = {"_local_scalar_dense", "nonzero", "is_nonzero"}


class Orders(TorchDispatchMode):
    """Counts operations, and among them those for whose answer the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.looks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.looks += func.overloadpacket.__name__ in LOOKS
        return func(*args, **(kwargs or {}))
