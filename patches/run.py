"""One sampling run: where in the schedule it is, the states of its techniques, what was taken and declined."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from .call import Call, Sampling, Sites, Step
from .clock import SigmaClock
from .journal import Record
from .layouts.layout import Layout, Unclear
from .layouts.role import Role
from .layouts.work import VIDEO
from .plan import Plan
from .stopwatch import PeakMemory, Stopwatch
from .technique import STEPS, State


@dataclass
class Tally:
    """What became of one technique, in its unit (forwards where no attention call could be read)."""

    taken: int = 0
    declined: Counter[str] = field(default_factory=Counter)

    def count(self, reason: str | None, times: int = 1) -> None:
        if reason is None:
            self.taken += times
        else:
            self.declined[reason] += times

    def record(self) -> dict[str, Any]:
        return {"taken": self.taken, "declined": dict(self.declined)}


@dataclass
class Evaluation:
    """One evaluation by the sampler, and what became of the techniques in it, by name."""

    step: Step
    watch: Stopwatch
    tallies: dict[str, Tally]

    def record(self) -> dict[str, Any]:
        told: dict[str, Any] = {"step": None, "sigma": None, "seconds": None}
        # What somebody has broken on the device may come to light here.
        with suppress(RuntimeError):
            told = {"step": self.step.number, "sigma": self.step.sigma, "seconds": self.watch.seconds()}
        return {**told, "outcomes": {name: tally.record() for name, tally in self.tallies.items()}}


class Price(NamedTuple):
    """FLOPs of the blocks of one forward for one cond: as stock computes them, and as they were left; and in how many
    blocks video was computed."""

    dense: float
    left: float
    blocks: int


class Run:
    """Everything of one sampling run that changes. Lives in transformer_options from its start to its end.

    Forwards of one run may come from several threads, one a device: counts are locked.
    """

    def __init__(
        self,
        plan: Plan,
        sigmas: Iterable[float],
        percent_to_sigma: Callable[[float], float],
        device: torch.device | None = None,
    ):
        self.id = uuid.uuid4().hex
        self.plan = plan
        self.clock = SigmaClock(tuple(map(float, sigmas)), percent_to_sigma)
        self.has_guidance = True
        sampling = Sampling(self.clock)
        self.states: tuple[State, ...] = tuple(technique.begin(sampling) for technique in plan)
        self._lock = threading.Lock()
        self._tallies = {technique.name: Tally() for technique in plan}
        self._evaluations: list[Evaluation] = []
        self._forwards = 0
        self._pairs: dict[Role, list[float]] = {}
        self._work = [0.0, 0.0]
        self._prices: dict[Any, Price | None] = {}
        self._sites: dict[int, Sites] = {}
        self._awaiting: set[State] = set()
        self._reached: set[State] = set()
        self._memory = PeakMemory(device or torch.device("cpu"))
        self._output: dict[str, list[str]] = {}

    def close(self) -> None:
        """Let go of every tensor, whatever fails meanwhile."""
        failed: BaseException | None = None
        for state in self.states:
            try:
                state.close()
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    @property
    def evaluations(self) -> int:
        return len(self._evaluations)

    def begin_step(self, timestep: torch.Tensor) -> Evaluation:
        """Before an evaluation by the sampler at the sigma in `timestep` [B]."""
        with self._lock:
            step = Step(len(self._evaluations) + 1, timestep, self.clock)
            tallies = {technique.name: Tally() for technique in self.plan}
            evaluation = Evaluation(step, Stopwatch(timestep.device), tallies)
            self._evaluations.append(evaluation)
        for state in self.states:
            state.step(step)
        return evaluation

    def end_step(self, evaluation: Evaluation) -> None:
        evaluation.watch.stop()
        for state in self.states:
            state.stepped(evaluation.step)
        with self._lock:
            for technique in self.plan:
                if technique.unit == STEPS:
                    self._count(technique.name, None, 1, evaluation)

    def count_forward(self) -> None:
        with self._lock:
            self._forwards += 1

    def decline_forward(self, reason: str) -> None:
        """A forward that nobody can read."""
        with self._lock:
            for technique in self.plan:
                self._count(technique.name, reason, 1, self._newest)

    def sites_of(self, model: torch.nn.Module, layout: Layout) -> Sites:
        """Looked for once: modules stay where they are while a run lasts."""
        if id(model) not in self._sites:
            self._sites[id(model)] = Sites(layout.sites())
        return self._sites[id(model)]

    def absorb(self, call: Call) -> None:
        """What became of a forward that came to its end."""
        price = self._price(call)
        if call.is_unwatched and not isinstance(call.tokens, Unclear):
            # Self-attention that nobody has a say in, in the blocks that were computed.
            calls = call.sites.count_of([Role.VIDEO_SELF])
            dense = float((calls if price is None else price.blocks) * call.tokens.total**2)
            call.count_pairs(Role.VIDEO_SELF, dense, dense)
        with self._lock:
            self._awaiting |= call.awaiting
            self._reached |= call.reached
            for state, reason, times in call.outcomes:
                self._count(state.technique.name, reason, times, self._newest)
            for role, pairs in call.pairs.items():
                total = self._pairs.setdefault(role, [0.0, 0.0])
                total[0] += pairs[0]
                total[1] += pairs[1]
            if price is not None:
                self._work[0] += price.dense * call.shape[0]
                self._work[1] += price.left * call.shape[0]

    def note_output(self, name: str, fingerprints: list[str]) -> None:
        """What the run has put out, as it lands in a LATENT that is not cast: fingerprints of its parts."""
        self._output[name] = fingerprints

    def record(self) -> Record:
        """The run in numbers and names, without tensors."""
        own = {state.technique.name: dict(state.record()) for state in self.states}
        with self._lock:
            by_step = [evaluation.record() for evaluation in self._evaluations]
            return {
                "id": self.id,
                "steps": self.clock.steps,
                "sigmas": self.clock.sigmas[:1] + self.clock.sigmas[-1:],
                "evaluations": len(by_step),
                "forwards": self._forwards,
                "by_step": by_step,
                "memory": self._memory.record(),
                "output": dict(self._output),
                "attention_share": _share(self._pairs.get(Role.VIDEO_SELF, [0.0, 0.0])),
                "work_share": _share(self._work) if self._work[0] else None,
                "techniques": {
                    technique.name: {
                        **own[technique.name],
                        "settings": asdict(technique),
                        "described": technique.describe(),
                        "unit": technique.unit,
                        "steps": technique.acting_steps(self.clock),
                        **self._tallies[technique.name].record(),
                        "is_expected": technique.expected >= self._tallies[technique.name].declined.keys(),
                        "is_reached": state in self._reached or state not in self._awaiting,
                    }
                    for technique, state in zip(self.plan, self.states, strict=True)
                },
            }

    @property
    def _newest(self) -> Evaluation | None:
        return self._evaluations[-1] if self._evaluations else None

    def _count(self, name: str, reason: str | None, times: int, evaluation: Evaluation | None) -> None:
        self._tallies[name].count(reason, times)
        if evaluation is not None:
            evaluation.tallies[name].count(reason, times)

    def _price(self, call: Call) -> Price | None:
        tokens = call.tokens
        if not self.clock.steps or isinstance(tokens, Unclear):
            return None
        acted = {state.technique.name for state, reason, _ in call.outcomes if reason is None}
        key = call.layout.shapes, tokens, call.text, frozenset(acted)
        if key not in self._prices:
            self._prices[key] = self._priced(call, acted)
        return self._prices[key]

    def _priced(self, call: Call, acted: set[str]) -> Price | None:
        work = call.layout.work(call.text[1] if call.text else 0)
        if isinstance(work, Unclear):
            return None
        left = work
        for technique in self.plan:
            left = technique.cost(left) if technique.name in acted else left
        flops, ours = call.layout.flops(work), call.layout.flops(left)
        if isinstance(flops, Unclear) or isinstance(ours, Unclear):
            return None
        return Price(flops, ours, sum((block, VIDEO) not in left.left_out for block in range(left.blocks)))


def _share(pair: Iterable[float]) -> float:
    dense, computed = pair
    return computed / dense if dense else 1.0
