"""How hot a GPU is: who can tell, and whether it can be believed."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

HIGHEST = 130
# No GPU keeps its temperature to the degree through so long a load and so long a rest.
WORKED, RESTED = 10.0, 30.0

NVML_GPU_DIE = 0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sensor:
    """read(): °C. It may raise anything, and its value may be anything."""

    name: str
    read: Callable[[], float]


class Trust:
    """Whether what one sensor says can be true."""

    def __init__(self) -> None:
        self._value = math.nan
        self._worked = self._rested = 0.0

    def complaint(self, reading: float, worked: float = 0.0, rested: float = 0.0) -> str | None:
        """What is wrong with it, given so many seconds of work and of rest since the reading before; None if nothing."""
        if not 0 < reading <= HIGHEST:
            return f"it says {reading:g} °C"
        if reading != self._value:
            self._value, self._worked, self._rested = reading, 0.0, 0.0
            return None
        self._worked += worked
        self._rested += rested
        if self._worked < WORKED or self._rested < RESTED:
            return None
        return f"it says {reading:g} °C through {self._worked:.0f} s of work and {self._rested:.0f} s of rest"


def sensors_of(device: torch.device) -> Iterator[Sensor]:
    """Those that can be asked about a device, the best first. Each is looked for when it is its turn."""
    if device.type != "cuda":
        return
    for source in (of_torch, of_driver):
        try:
            sensor = source(device)
        except Exception as error:
            # Libraries of vendors: whatever one lacks, it is not there.
            logger.debug("FrameThrift: no temperature by %s: %s", source.__name__, error)
            continue
        yield sensor


def of_torch(device: torch.device) -> Sensor:
    """Needs nvidia-ml-py or, for AMD, amdsmi; raises without."""
    torch.cuda.temperature(device)
    return Sensor("torch.cuda.temperature", lambda: torch.cuda.temperature(device))


def of_driver(device: torch.device) -> Sensor:
    """Of NVIDIA's driver. The driver counts GPUs in an order of its own, so the device is looked up by its UUID."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return nvml_sensor(nvml(), uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


@functools.cache
def nvml() -> Any:
    """The driver's library, ready for use."""
    library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    _expect_success(library.nvmlInit_v2())
    return library


def nvml_sensor(library: Any, uuid: str) -> Sensor:
    handle = ctypes.c_void_p()
    _expect_success(library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)))

    def read() -> float:
        value = ctypes.c_uint()
        _expect_success(library.nvmlDeviceGetTemperature(handle, NVML_GPU_DIE, ctypes.byref(value)))
        return value.value

    return Sensor("NVML", read)


def _expect_success(code: int) -> None:
    if code:
        raise RuntimeError(f"NVML answers with error {code}")
