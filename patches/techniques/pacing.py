"""GPU pacing: pauses that keep the GPU below a temperature, or busy for a share of the time only."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import comfy.model_management as mm
import torch

from ..call import Call, Sampling
from ..device_queue import DeviceQueue, queue_of
from ..node_text import NodeText
from ..reuse.recorder import is_recording
from ..sensors import Sensor, Trust, sensors_of
from ..settings import Number, Whole, setting
from ..technique import Replacement, State, Technique

NO_SENSOR = "NO_SENSOR"
STREAM_CAPTURED = "STREAM_CAPTURED"

TEMPERATURE, DUTY = "temperature", "duty"

# Seconds: work between two looks; rest between two looks at the sensor; sleep between two looks for a Cancel, at most and
# at least.
SLICE, REST, NAP, SHORTEST = 0.25, 0.25, 0.1, 1e-4
# Blocks that the device has still to begin while the host looks: enough that it never runs dry.
AHEAD = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuPacing(Technique):
    """At `target_temperature` °C the GPU waits until it is `resume_below` degrees cooler; 0 ignores its temperature.

    max_duty: the share of the time for which it may compute. max_pause: seconds; all pauses of one step together are no
    longer. Results stay the same, bit for bit.
    """

    name: ClassVar[str] = "GPU pacing"
    stage: ClassVar[int] = 50

    target_temperature: int = setting(Whole(75, 0, 100))
    resume_below: int = setting(Whole(5, 1, 30))
    max_duty: float = setting(Number(1.0, 0.1, 1.0, 0.05))
    max_pause: float = setting(Number(60.0, 1.0, 600.0, 1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.target_temperature <= self.resume_below:
            raise ValueError(
                f"resume_below is {self.resume_below}; it takes fewer degrees than target_temperature, which is "
                f"{self.target_temperature}."
            )

    @property
    def is_neutral(self) -> bool:
        return not self.target_temperature and self.max_duty == 1

    @property
    def neutral_because(self) -> str:
        return "target_temperature is 0 and max_duty is 1"

    @property
    def resumes_at(self) -> int:
        return self.target_temperature - self.resume_below

    def describe(self) -> str:
        parts = [
            f"cools from {self.target_temperature} °C to {self.resumes_at} °C"
            if self.target_temperature
            else "",
            f"busy {self.max_duty:.0%} of the time" if self.max_duty < 1 else "",
        ]
        return ", ".join(part for part in parts if part)

    def words_for(self, part: Mapping[str, Any]) -> str:
        return "".join(
            f"; paused {sum(told['paused'].values()):.1f} s on {device}{_parts_of(told)}"
            for device, told in part["devices"].items()
        )

    def begin(self, run: Sampling) -> State:
        return Pacing(self, run)


def _parts_of(told: Mapping[str, Any]) -> str:
    parts = [f"{seconds:.1f} s for {reason}" for reason, seconds in sorted(told["paused"].items())]
    if told["sensor"] is not None:
        parts.append(f"{told['hottest']:g} °C at most, {told['last']:g} °C last by {told['sensor']}")
    return f" ({', '.join(parts)})" if parts else ""


class Pacing(State):
    """queues, sensors: what is known of the devices."""

    technique: GpuPacing

    def __init__(
        self,
        technique: GpuPacing,
        run: Sampling,
        queues: Callable[[torch.device], DeviceQueue] = queue_of,
        sensors: Callable[[torch.device], Iterator[Sensor]] = sensors_of,
    ) -> None:
        super().__init__(technique, run)
        self._queues, self._sensors = queues, sensors
        self._text = NodeText()
        self._lock = threading.Lock()
        self._paces: dict[torch.device, Pace] = {}

    def _pace(self, device: torch.device) -> Pace:
        with self._lock:
            if device not in self._paces:
                sensors = self._sensors(device) if self.technique.target_temperature else iter(())
                self._paces[device] = Pace(
                    self.technique, self.run, self._queues(device), sensors, self._text
                )
            return self._paces[device]

    def call(self, call: Call) -> Mapping[str, Any] | str:
        pace = self._pace(call.device)
        if pace.queue.is_captured():
            return STREAM_CAPTURED
        if not pace.has_aim:
            return NO_SENSOR
        pace.begin(call.step)
        return {}

    def modules(self, call: Call) -> Iterator[tuple[torch.nn.Module, Replacement]]:
        if not call.is_compiled:
            for block in call.layout.blocks:
                yield block, partial(_paced, self._pace(call.device))

    def called(self, call: Call, error: BaseException | None) -> Iterable[str | None]:
        if error is not None or self not in call.acting:
            return []
        self._pace(call.device).end()
        return [None]

    def record(self) -> Mapping[str, Any]:
        """By device; the seconds of the run's steps contain these pauses."""
        with self._lock:
            return {"devices": {str(device): pace.record() for device, pace in self._paces.items()}}


# Wherever torch.compile has escaped notice, it breaks off here.
@torch.compiler.disable(recursive=False)
def _paced(pace: Pace, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = original(*args, **kwargs)
    pace.between_blocks()
    return out


class Pace:
    """One device in one run. Forwards of a device come one after the other, so nothing here is locked."""

    def __init__(
        self,
        technique: GpuPacing,
        run: Sampling,
        queue: DeviceQueue,
        sensors: Iterator[Sensor],
        text: NodeText,
    ) -> None:
        self.technique, self.run, self.queue, self.text = technique, run, queue, text
        self._sensors = sensors
        self._sensor, self._trust = next(sensors, None), Trust()
        self._hottest = self._last = 0.0
        self._paused: defaultdict[str, float] = defaultdict(float)
        self._by_step: defaultdict[int, float] = defaultdict(float)
        self._step = -1
        self._looked = queue.now()
        # Work since the last pause, as pairs of marks, but for the piece that is going on.
        self._pieces: list[tuple[Any, Any]] = []
        self._piece = queue.mark()
        self._end: Any = None
        self._ahead: deque[Any] = deque()
        if technique.target_temperature and self._sensor is None:
            advice = " Install nvidia-ml-py, or amdsmi on AMD." if queue.device.type == "cuda" else ""
            self._warn(f"finds no temperature sensor for {queue.device}; {self._instead}.{advice}")

    @property
    def has_aim(self) -> bool:
        return self._sensor is not None or self.technique.max_duty < 1

    @property
    def _instead(self) -> str:
        if self._sensor is not None:
            return f"{self._sensor.name} is asked instead"
        return "only max_duty paces" if self.has_aim else "nothing paces, for max_duty is 1"

    def begin(self, step: int) -> None:
        """Before a forward."""
        self._step = step
        if self._end is None:
            self._piece, self._looked = self.queue.mark(), self.queue.now()
        elif self.queue.has_passed(self._end):
            # It has had nothing to do since then.
            self._pieces.append((self._piece, self._end))
            self._piece = self.queue.mark()
        self._look()

    def between_blocks(self) -> None:
        if is_recording(self.queue.device) or self.queue.is_captured():
            return
        # Else the host gives away many slices at once, and nothing can be done about them.
        self._ahead.append(self.queue.mark())
        if len(self._ahead) > AHEAD:
            self.queue.wait_for(self._ahead.popleft())
        self._look()

    def end(self) -> None:
        """After a forward."""
        self._ahead.clear()
        self._end = self.queue.mark()
        self._look()

    def _look(self) -> None:
        now = self.queue.now()
        worked = now - self._looked
        if worked < SLICE:
            return
        self._looked = now
        reading = self._read(worked=worked)
        is_hot = reading is not None and reading >= self.technique.target_temperature
        if not is_hot and self.technique.max_duty == 1:
            return
        # What this step may no longer pause for is not made up for later.
        if self._left() > 0:
            end = self.queue.mark()
            self.queue.drain()
            busy = sum(self.queue.seconds(*piece) for piece in (*self._pieces, (self._piece, end)))
            if not is_hot and busy < SLICE:
                return
            cooled = self._cool(reading) if is_hot else 0.0
            self._pause(busy * (1 / self.technique.max_duty - 1) - cooled, DUTY)
        self._pieces.clear()
        self._ahead.clear()
        self._piece = self._end = self.queue.mark()
        self._looked = self.queue.now()

    def _cool(self, reading: float | None) -> float:
        """Pause until it is cool enough; for how long."""
        begun, resumes_at = self._paused[TEMPERATURE], self.technique.resumes_at
        while reading is not None and reading > resumes_at and self._left() > 0:
            self.text.show(f"cooling {reading:.0f} °C → {resumes_at} °C")
            rested = self._pause(REST, TEMPERATURE)
            reading = self._read(rested=rested)
        if reading is not None:
            self.text.show(f"cooled to {reading:.0f} °C")
        return self._paused[TEMPERATURE] - begun

    def _left(self) -> float:
        """Seconds for which this step may still pause; what is too short to be slept is none."""
        left = self.technique.max_pause - self._by_step[self._step]
        return left if left > SHORTEST else 0.0

    def _pause(self, seconds: float, reason: str) -> float:
        """Do nothing for so long, or for what is left of max_pause; for how long it was."""
        if seconds <= 0:
            return 0.0
        begun = now = self.queue.now()
        end = begun + min(seconds, self._left())
        try:
            while end - now > SHORTEST:
                mm.throw_exception_if_processing_interrupted()
                self.queue.sleep(min(NAP, end - now))
                now = self.queue.now()
            mm.throw_exception_if_processing_interrupted()
        finally:
            self._paused[reason] += now - begun
            self._by_step[self._step] += now - begun
        if not self._left():
            self._say_exhausted()
        return now - begun

    def _read(self, worked: float = 0.0, rested: float = 0.0) -> float | None:
        """°C by the first sensor that can be believed, None without one."""
        while self._sensor is not None:
            try:
                reading = float(self._sensor.read())
                complaint = self._trust.complaint(reading, worked, rested)
            except Exception as error:
                # Libraries of vendors fail in ways of their own.
                complaint = f"it fails ({error})"
            if complaint is None:
                self._last, self._hottest = reading, max(self._hottest, reading)
                return reading
            dropped = self._sensor.name
            self._sensor, self._trust = next(self._sensors, None), Trust()
            self._warn(f"drops {dropped} of {self.queue.device}: {complaint}; {self._instead}.")
        return None

    def _say_exhausted(self) -> None:
        at = "" if self._sensor is None else f" at {self._last:.0f} °C"
        self._warn(
            f"has paused for all of max_pause ({self.technique.max_pause:g} s) in step {self._step + 1} and goes on{at}; "
            "so it will in other steps. To keep to the settings raise max_pause.",
            once="max_pause",
        )

    def _warn(self, text: str, once: str | None = None) -> None:
        if self.run.say_once(f"{self.technique.name} {once or text}"):
            logger.warning("FrameThrift: %s %s", self.technique.name, text)

    def record(self) -> dict[str, Any]:
        return {
            "paused": dict(self._paused),
            "paused_by_step": {str(step): seconds for step, seconds in self._by_step.items() if seconds},
            "sensor": None if self._sensor is None else self._sensor.name,
            "hottest": self._hottest,
            "last": self._last,
        }
