"""Attention precision: video attention computed in another type than the model computes in."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .. import backend
from ..call import Attend, AttentionCall, Call, Sampling
from ..kernels.precision import attend_in
from ..layouts.role import Role
from ..layouts.work import Work
from ..reuse.recorder import outliving_blocks
from ..settings import Choice, setting
from ..technique import State, Technique

AUTO = "auto"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHOICES = (AUTO, *DTYPES)

SAME_DTYPE = "SAME_DTYPE"
OTHER_DTYPE = "OTHER_DTYPE"
HALF_BACKEND = "HALF_BACKEND"


@dataclass(frozen=True)
class AttentionPrecision(Technique):
    """Video self-attention and that to the text each in float16, bfloat16, float32, or AUTO: what the device does fast.

    q, k, v and masks are cast once an attention call, and the output back. AUTO leaves a half type that the device does
    fast as it is, and everything on the CPU.
    """

    name: ClassVar[str] = "attention precision"
    stage: ClassVar[int] = 40
    expected: ClassVar[frozenset[str]] = frozenset({SAME_DTYPE})
    advice_if_never_needed: ClassVar[str] = (
        "Attention was computed in the chosen type anyway in every run so far: choose another type, or leave the node out."
    )

    self_attention: str = setting(Choice(AUTO, CHOICES))
    text_attention: str = setting(Choice(AUTO, CHOICES))

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({Role.VIDEO_SELF, Role.VIDEO_TEXT})

    def describe(self) -> str:
        return f"self-attention {self.self_attention}, text attention {self.text_attention}"

    def dtype(self, role: Role, device: torch.device, own: torch.dtype) -> torch.dtype:
        """The type of an attention call whose inputs come in `own`."""
        asked = self.self_attention if role is Role.VIDEO_SELF else self.text_attention
        return backend.fast_dtype(device, own) if asked == AUTO else DTYPES[asked]

    def cost(self, work: Work) -> Work:
        """Work is counted in FLOPs: as many in any type, each of another length on each card."""
        return work

    def words_for(self, part: Mapping[str, Any]) -> str:
        told = "".join(f"; {role} in {', '.join(types)}" for role, types in sorted(part["types"].items()))
        if part["is_upcast"]:
            told += "; ComfyUI is set to upcast attention, so its logits are float32 nevertheless"
        if part["nonfinite"]:
            told += (
                f"; {part['nonfinite']} attention calls came out with numbers that are not finite, though queries and values were: "
                "use bf16 or fp32 there"
            )
        return told

    def has_failed(self, part: Mapping[str, Any]) -> bool:
        return bool(part["nonfinite"])

    def begin(self, run: Sampling) -> State:
        return Casting(self, run)


class Casting(State):
    """types: what was computed in, by role. nonfinite: attention calls whose result is not finite, read when the run ends."""

    technique: AttentionPrecision

    def __init__(self, technique: AttentionPrecision, run: Sampling) -> None:
        super().__init__(technique, run)
        self._lock = threading.Lock()
        self._counters: dict[torch.device, torch.Tensor] = {}
        self._types: dict[str, set[str]] = {}
        self._is_upcast = False
        self._nonfinite = 0

    def call(self, call: Call) -> Mapping[str, Any] | str:
        # Before the first block: a counter made inside of one would not outlive it.
        self._counter(call.device)
        return super().call(call)

    def attend(self, attention: AttentionCall, inner: Attend) -> torch.Tensor | str:
        q, k, v = attention.q, attention.k, attention.v
        given = {x.dtype for x in (q, k, v)}
        if not given <= set(DTYPES.values()):
            return OTHER_DTYPE
        dtype = self.technique.dtype(attention.site.role, q.device, q.dtype)
        if given == {dtype}:
            return SAME_DTYPE
        obstacle = self._obstacle(attention) if dtype == torch.float32 else None
        if obstacle is not None:
            return obstacle

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
        ) -> torch.Tensor:
            return inner(replace(attention, q=q, k=k, v=v, mask=mask))

        out, is_broken = attend_in(dtype, attend, q, k, v, attention.mask)
        self._counter(q.device).add_(is_broken)
        self._note(attention, dtype)
        return out

    def _obstacle(self, attention: AttentionCall) -> str | None:
        """Why this call cannot be computed in float32, or None: kernels of others, as sage attention, take half types only."""
        if attention.foreign is not None:
            return attention.foreign
        return None if backend.takes_float32() else HALF_BACKEND

    def _counter(self, device: torch.device) -> torch.Tensor:
        with self._lock:
            if device not in self._counters:
                with outliving_blocks():
                    self._counters[device] = torch.zeros((), dtype=torch.int64, device=device)
            return self._counters[device]

    def _note(self, attention: AttentionCall, dtype: torch.dtype) -> None:
        role, name = attention.site.role.value, str(dtype).removeprefix("torch.")
        with self._lock:
            self._types.setdefault(role, set()).add(name)
            self._is_upcast |= attention.foreign is None and backend.upcasts(dtype)

    def record(self) -> Mapping[str, Any]:
        return {
            "types": {role: sorted(names) for role, names in self._types.items()},
            "is_upcast": self._is_upcast,
            "nonfinite": self._nonfinite,
        }

    def close(self) -> None:
        counters, self._counters = self._counters, {}
        # What somebody has broken on the device may come to light here.
        with suppress(RuntimeError):
            self._nonfinite = sum(int(counter) for counter in counters.values())
