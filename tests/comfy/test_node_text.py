"""The text at the node that is being executed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

context = pytest.importorskip("comfy_execution.utils")


@pytest.fixture
def sent(monkeypatch):
    """What a server has been told, as (text, node)."""
    told = []
    instance = SimpleNamespace(send_progress_text=lambda text, node: told.append((text, node)))
    monkeypatch.setitem(
        sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    )
    return told


def test_it_is_shown_at_the_node_that_is_executed_and_once(pack, sent):
    with context.CurrentNodeContext("prompt", "17"):
        text = pack("patches.node_text").NodeText()
    for words in ("one", "one", "two"):
        text.show(words)
    assert sent == [("one", "17"), ("two", "17")]


def test_without_a_node_or_a_server_nothing_is_shown(pack, sent, monkeypatch):
    pack("patches.node_text").NodeText().show("one")
    assert sent == []
    monkeypatch.delitem(sys.modules, "server")
    with context.CurrentNodeContext("prompt", "17"):
        pack("patches.node_text").NodeText().show("one")


def test_cooling_is_shown(pack, sent):
    from laptop import Laptop

    pacing, laptop = pack("patches.techniques.pacing"), Laptop(start=78.4)
    run = pack("patches.call").Sampling(
        pack("patches.clock").SigmaClock((1.0, 0.0), lambda percent: 1 - percent)
    )

    def sensors(device):
        return laptop.sensors(pack("patches.sensors").Sensor)

    with context.CurrentNodeContext("prompt", "17"):
        state = pacing.Pacing(pacing.GpuPacing(), run, lambda device: laptop, sensors)
    call = SimpleNamespace(device=laptop.device, step=0, acting=[state])
    state.call(call)
    laptop.work(0.3)
    state.called(call, None)
    texts = [text for text, _ in sent]
    assert texts[0] == "cooling 79 °C → 70 °C" and "cooling 75 °C → 70 °C" in texts
    assert texts[-1] == "cooled to 70 °C" and len(set(texts)) == len(texts)
