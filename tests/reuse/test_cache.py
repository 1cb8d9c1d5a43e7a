"""Which forward may use an entry, and what becomes of it."""

import pytest
import torch


@pytest.fixture
def cache(pack):
    """Entries of a run of eight steps, one of three of them full."""
    parts = pack("patches.reuse.cache")
    rhythm = parts.Rhythm(8, tuple(range(8)), 3, False, 1, is_earlier=lambda sigma, other: sigma > other)
    assert rhythm.frozen == (1, 2, 4, 5)
    return parts.Cache(rhythm, pack("patches.reuse.store").Store())


def looked_up(cache, pack, step=0):
    key = pack("patches.reuse.cache").Key(("cond",), None, torch.device("cpu"))
    return cache.look_up(key, step, 1 - step / 8, step + 1)


def test_a_run_that_ends_with_a_failed_copy_lets_go_of_everything(cache, pack, monkeypatch):
    store = pack("patches.reuse.store")
    lookup = looked_up(cache, pack)
    lookup.store((0, "block"), torch.ones(4))
    lookup.finish()
    closed = []
    monkeypatch.setattr(store.PinnedMemory, "close", lambda self: closed.append(True))

    def fail(self):
        raise RuntimeError("device lost")

    monkeypatch.setattr(store.StoredTensor, "wait", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        cache.close()
    assert closed and not lookup.found.entries


def test_a_value_of_another_form_without_room_is_counted_once(cache, pack):
    lookup = looked_up(cache, pack)
    lookup.store((0, "block"), torch.ones(4))
    cache.store.rooms = {"gpu": 16, "cpu": 0}
    lookup.store((0, "block"), torch.ones(64))
    assert lookup.refused == 1 and not lookup.found.entries
    cache.close()
    assert not cache.store.taken.total()


def test_memory_that_runs_out_on_one_device_leaves_another_its_values(cache, pack):
    """Until its next forward; a forward that has asked gets what it was promised."""
    other = looked_up(cache, pack)
    other.store((0, "block"), torch.ones(4))
    other.computed = 1
    other.finish()
    frozen = looked_up(cache, pack, step=1)
    assert frozen.has((0, "block"))
    cache.give_up(torch.device("meta"))
    assert torch.equal(frozen.value((0, "block")), torch.ones(4))
    assert looked_up(cache, pack, step=2).reason == "OUT_OF_MEMORY"
    looked_up(cache, pack, step=3)
    assert not cache.store.taken.total()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_linear_forecast_stays_within_its_type(dtype, pack):
    """From 20000 to 50000 in half a step of the schedule leads to 80000, which float16 has not."""
    older = torch.tensor([20000.0, -20000.0, 1.0]).to(dtype)
    value = pack("patches.reuse.entry").forecast(older, older * 2.5, 1.0, 0.75, 0.5)
    assert value.isfinite().all() and value.dtype == dtype
    largest = min(80000, torch.finfo(dtype).max)
    assert torch.allclose(value.double(), torch.tensor([largest, -largest, 4.0]).double(), rtol=0.01)
