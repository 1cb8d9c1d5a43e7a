"""Who is asked for a GPU's temperature, and who is believed."""

from __future__ import annotations

import ctypes

import pytest
import torch

GPU = torch.device("cuda", 0)
UUID = "GPU-00000000-1111-2222-3333-444444444444"


class Driver:
    """NVIDIA's library as far as it is called, with one GPU in it."""

    def __init__(self, temperature=63, code=0):
        self.temperature, self.code = temperature, code

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        if uuid != UUID.encode():
            return 6
        handle._obj.value = 77
        return 0

    def nvmlDeviceGetTemperature(self, handle, kind, value):
        assert handle.value == 77 and kind == 0
        value._obj.value = self.temperature
        return self.code


@pytest.fixture
def sensors(pack):
    return pack("patches.sensors")


@pytest.fixture
def driver(sensors, monkeypatch):
    """A driver for torch's device of that UUID, as torch writes it."""
    driver = Driver()
    monkeypatch.setattr(sensors, "nvml", lambda: driver)
    properties = type("Properties", (), {"uuid": UUID.removeprefix("GPU-")})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return driver


def test_the_library_of_the_driver_is_asked_by_uuid(sensors, driver):
    sensor = sensors.nvml_sensor(driver, UUID)
    assert sensor.name == "NVML" and sensor.read() == 63
    driver.code = 15
    with pytest.raises(RuntimeError, match="error 15"):
        sensor.read()
    with pytest.raises(RuntimeError, match="error 6"):
        sensors.nvml_sensor(driver, "GPU-other")


def test_torch_first_then_the_driver(sensors, driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: 51)
    assert [(s.name, s.read()) for s in sensors.sensors_of(GPU)] == [
        ("torch.cuda.temperature", 51),
        ("NVML", 63),
    ]


def test_without_the_library_of_torch(sensors, driver, monkeypatch):
    def lacking(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "temperature", lacking)
    assert [sensor.name for sensor in sensors.sensors_of(GPU)] == ["NVML"]


def test_without_either(sensors, monkeypatch):
    """As on this machine, if it has no GPU, and on a CPU."""

    def lacking(*_):
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "temperature", lacking)
    monkeypatch.setattr(ctypes, "CDLL", lacking)
    sensors.nvml.cache_clear()
    assert list(sensors.sensors_of(GPU)) == [] == list(sensors.sensors_of(torch.device("cpu")))


@pytest.mark.parametrize("reading", [0, -1, 131, 255, float("nan")])
def test_what_no_gpu_can_have(reading, sensors):
    assert "°C" in sensors.Trust().complaint(reading)


def test_the_same_through_work_and_rest_is_a_frozen_sensor_and_through_one_of_them_is_not(sensors):
    for work, rest in ((1.0, 0.0), (0.0, 1.0)):
        trust = sensors.Trust()
        assert not any(trust.complaint(81, work, rest) for _ in range(10_000))
    trust = sensors.Trust()
    assert not any(trust.complaint(81, rested=1.0) for _ in range(60))
    assert not any(trust.complaint(81, worked=1.0) for _ in range(9))
    assert "81 °C through" in trust.complaint(81, worked=2.0)


def test_one_other_reading_is_enough_to_be_believed(sensors):
    trust = sensors.Trust()
    for number in range(100):
        assert not trust.complaint(81 - number % 2, worked=9.0, rested=29.0)
