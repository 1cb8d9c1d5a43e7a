"""ComfyUI's recorder of allocations, played on the CPU, after comfy/model_prefetch.py of 0.35 and comfy_aimdo's malloc_graph.

Its rules: what is allocated in a transformer block, not under the pause, is gone at the end of the block; what was
allocated so is not let go while paused; pauses do not nest; no other stream is told to hold on to memory of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Watches a sampling run of `model`; `faults` are the rules it broke."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.blocks = 0
        self._is_in_block = self._is_paused = False
        self._born: dict[int, StorageWeakRef] = {}
        self._hooks = []
        for block in model.model.diffusion_model.transformer_blocks:
            self._hooks.append(block.register_forward_pre_hook(self._enter))
            self._hooks.append(block.register_forward_hook(self._leave))

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(x) for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if self._is_in_block and not self._is_paused:
            for made in tree_leaves(out):
                if isinstance(made, torch.Tensor) and id_of(made) not in given:
                    self._born[id_of(made)] = StorageWeakRef(made.untyped_storage())
        return out

    @contextmanager
    def pause(self) -> Iterator[None]:
        if self._is_paused:
            self.faults.append("a pause within a pause")
        alive = self._alive()
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            if self._alive() != alive:
                self.faults.append("memory of a block let go while paused")

    def on_record_stream(self, tensor: torch.Tensor) -> None:
        if id_of(tensor) in self._alive():
            self.faults.append("record_stream on memory of a block")

    def _alive(self) -> set[int]:
        return {key for key, storage in self._born.items() if not storage.expired()}

    def _enter(self, *_: Any) -> None:
        self._is_in_block = True
        self.blocks += 1

    def _leave(self, module: Any, given: Any, out: Any) -> None:
        self._is_in_block = False
        self.faults += ["memory of a block that outlives it"] * len(self._alive())
        self._born.clear()


def id_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def play_recorder(pack: Any, monkeypatch: Any, model: Any, has_streams: bool) -> Recorder:
    """A recorder that the pack finds in ComfyUI. has_streams: host memory is far, and copies run on a second stream."""
    recorder = Recorder(model)
    core = SimpleNamespace(pause_malloc_graph=recorder.pause)
    monkeypatch.setattr(pack("patches.reuse.recorder"), "model_prefetch", core)
    if has_streams:
        store = pack("patches.reuse.store")
        monkeypatch.setattr(store, "shares_host_memory", lambda device: False)
        monkeypatch.setattr(store, "has_streams", lambda device: True)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", entered)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: recorder.on_record_stream(tensor)
        )
    return recorder


class Stream:
    """A stream that is done as soon as it is told."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self) -> Any:
        return self


@contextmanager
def entered(stream: Stream) -> Iterator[None]:
    yield
