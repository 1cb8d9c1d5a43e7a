"""Host memory for kept values, and their packing."""

import threading

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_keeps_every_vector_within_its_precision(dtype, pack):
    cache = pack("patches.cache")
    value = (
        torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 4, 5)[:, None]
    )
    value[0, 0], value[1, 1, 7] = 0, 6e4
    value = value.to(dtype)
    parts = cache.pack(value)
    assert sum(part.nbytes for part in parts) == cache.Shelf(precision=cache.FP8).size_of(value)
    back = cache.unpack(parts)
    assert back.dtype == dtype and back.isfinite().all()
    largest = value.abs().amax(dim=-1, keepdim=True).double()
    # 3 bits of mantissa, and a subnormal step of 2^-9 at a scale of largest / 448.
    allowed = value.abs().double() * 2**-4 * 1.05 + largest.clamp_min(448 * 2**-14) / 448 * 2**-9
    assert ((back - value).abs().double() <= allowed).all()


@pytest.mark.parametrize("piece", [100, 30_000, 2**15 + 1, 2**16, 2**16 + 4096])
def test_host_room_wastes_nothing_and_hands_out_every_byte_once(piece, pack, monkeypatch):
    host = pack("patches.host")
    monkeypatch.setattr(host, "CHUNK", 2**16)
    room = host.HostRoom()
    room.grow(5 * piece, piece)
    ready = room.size
    assert 5 * piece <= ready < 5 * piece + max(host.CHUNK, host.aligned(piece)) + 5 * host.ALIGNMENT
    taken = [room.take(piece) for _ in range(5)]
    assert room.size == ready and all(piece <= buffer.nbytes < piece + host.ALIGNMENT for buffer in taken)
    other = room.take(piece + 1000)
    spans = sorted((buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in [*taken, other])
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    room.give_back(taken[2])
    assert room.take(piece).data_ptr() == taken[2].data_ptr()
    room.close()
    assert room.size == 0


def test_host_room_unlocks_what_was_locked_and_asks_no_more_once_refused(pack, monkeypatch):
    host, locked, unlocked, asked = pack("patches.host"), [], [], []

    def pin_memory(chunk):
        asked.append(chunk)
        if len(asked) > 2:
            return False
        locked.append(chunk.data_ptr())
        return True

    monkeypatch.setattr(host.mm, "pin_memory", pin_memory)
    monkeypatch.setattr(host.mm, "unpin_memory", lambda chunk: unlocked.append(chunk.data_ptr()))
    monkeypatch.setattr(host, "CHUNK", 2**16)
    room = host.HostRoom()
    room.grow(5 * host.CHUNK, host.CHUNK)
    room.take(host.CHUNK)
    assert len(asked) == 3 and len(locked) == 2
    room.close()
    assert unlocked == locked


def test_host_room_waits_for_the_system_only_where_memory_is_taken(pack, monkeypatch):
    """And locks what is there in the callers' thread."""
    host, locked, may_come = pack("patches.host"), [], threading.Event()

    def pin_memory(chunk):
        locked.append(threading.current_thread())
        return True

    def touched(chunk):
        may_come.wait(60)
        return original(chunk)

    original = host.touched
    monkeypatch.setattr(host, "touched", touched)
    monkeypatch.setattr(host.mm, "pin_memory", pin_memory)
    monkeypatch.setattr(host.mm, "unpin_memory", lambda chunk: True)
    monkeypatch.setattr(host, "CHUNK", 2**16)
    room = host.HostRoom()
    room.grow(3 * host.CHUNK, host.CHUNK)
    room.grow(5 * host.CHUNK, host.CHUNK)
    assert room.size == 5 * host.CHUNK and not locked
    threading.Timer(0.2, may_come.set).start()
    room.take(host.CHUNK)
    assert locked == [threading.current_thread()] * 5
    room.close()


def test_host_room_locks_what_has_come_with_the_next_growth(pack, monkeypatch):
    host, locked = pack("patches.host"), []
    monkeypatch.setattr(host.mm, "pin_memory", lambda chunk: locked.append(chunk) or True)
    monkeypatch.setattr(host.mm, "unpin_memory", lambda chunk: True)
    room = host.HostRoom()
    room.grow(5 * host.PAGE, host.PAGE)
    room._coming[-1].result(60)
    room.grow(room.size, host.PAGE)
    assert len(locked) == len(room._chunks)
    room.close()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_host_room_serves_whatever_mode_it_is_asked_in(mode, pack):
    host = pack("patches.host")
    room = host.HostRoom()
    with mode():
        room.grow(3 * host.PAGE, host.PAGE)
        room.take(host.PAGE).copy_(torch.ones(host.PAGE, dtype=torch.uint8))
    room.take(host.PAGE)
    room.close()


def test_host_room_closes_while_memory_comes(pack, monkeypatch):
    host = pack("patches.host")
    monkeypatch.setattr(host, "CHUNK", 2**16)
    room = host.HostRoom()
    room.grow(50 * host.CHUNK, host.CHUNK)
    room.close()
    room.close()
    assert room.size == 0


def test_every_page_is_touched(pack):
    host = pack("patches.host")
    chunk = torch.full((5 * host.PAGE + 1,), 7, dtype=torch.uint8)
    assert host.touched(chunk) is chunk and (chunk == 0).nonzero()[:, 0].tolist() == [
        host.PAGE * page for page in range(6)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_lie_one_behind_the_other(dtype, pack):
    """Also where a value has an odd count of numbers."""
    cache = pack("patches.cache")
    parts = cache.pack(torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype))
    memory = torch.zeros(sum(part.nbytes for part in parts) + 9, dtype=torch.uint8)
    buffers = cache.carved(memory, parts)
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part)
    assert torch.equal(cache.unpack(buffers), cache.unpack(parts))


def test_auto_goes_to_host_memory_once_the_gpu_has_none(pack, monkeypatch):
    cache, asked = pack("patches.cache"), []
    original = cache.Kept

    def kept(shelf, tensor, place, is_packed):
        asked.append(place)
        if asked.count(cache.GPU) == 2 and place == cache.GPU:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(shelf, tensor, place, is_packed)

    monkeypatch.setattr(cache, "Kept", kept)
    shelf = cache.Shelf()
    places = [shelf.keep(torch.ones(4)).place for _ in range(4)]
    assert places == [cache.GPU, cache.HOST, cache.HOST, cache.HOST]
    # Not asked again, and what could not be had is not reported.
    assert asked.count(cache.GPU) == 2 and shelf.most == {cache.GPU: 16, cache.HOST: 48}


@pytest.mark.parametrize("placement", ["gpu", "cpu"])
def test_no_memory_anywhere(placement, pack, monkeypatch):
    cache = pack("patches.cache")

    def kept(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cache, "Kept", kept)
    shelf = cache.Shelf(placement)
    assert shelf.keep(torch.ones(4)) is None and not shelf.taken.total() and not shelf.most.total()


@pytest.fixture
def reuse(pack):
    """Kept values of a run of eight steps, one of three of them full."""
    parts = pack("patches.reuse")
    clock = pack("patches.clock").SigmaClock(tuple(1 - i / 8 for i in range(9)), lambda percent: 1 - percent)
    rhythm = parts.Rhythm(tuple(range(8)), (1, 2, 4, 5), 3, False, 1)
    return parts.Reuse(rhythm, clock, pack("patches.cache").Shelf())


def begun(reuse, pack, sigma=1.0, evaluation=1):
    subject = pack("patches.reuse").Subject(("cond",), None, torch.device("cpu"))
    return reuse.begin(subject, sigma, evaluation)


def test_a_run_that_ends_with_a_failed_copy_lets_go_of_everything(reuse, pack, monkeypatch):
    moment = begun(reuse, pack)
    moment.store((0, "block"), torch.ones(4))
    moment.finish()
    closed = []
    monkeypatch.setattr(reuse.shelf._host, "close", lambda: closed.append(True))

    def fail():
        raise RuntimeError("device lost")

    monkeypatch.setattr(moment.slot.held[0, "block"].newest, "wait", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        reuse.close()
    assert closed and not moment.slot.held


def test_a_value_of_another_form_without_room_is_counted_once(reuse, pack):
    moment = begun(reuse, pack)
    moment.store((0, "block"), torch.ones(4))
    reuse.shelf.rooms = {"gpu": 16, "cpu": 0}
    moment.store((0, "block"), torch.ones(64))
    assert moment.refused == 1 and not moment.slot.held
    reuse.close()
    assert not reuse.shelf.taken.total()


def test_memory_that_runs_out_on_one_device_leaves_another_its_values(reuse, pack):
    """Until its next forward; a forward that has asked gets what it was promised."""
    other = begun(reuse, pack)
    other.store((0, "block"), torch.ones(4))
    other.computed = 1
    other.finish()
    frozen = begun(reuse, pack, sigma=0.875, evaluation=2)
    assert frozen.has((0, "block"))
    reuse.give_up(torch.device("meta"))
    assert torch.equal(frozen.value((0, "block")), torch.ones(4))
    assert begun(reuse, pack, sigma=0.75, evaluation=3).reason == "OUT_OF_MEMORY"
    begun(reuse, pack, sigma=0.625, evaluation=4)
    assert not reuse.shelf.taken.total()


def test_host_memory_is_let_go_even_if_a_stream_failed(pack, monkeypatch):
    cache = pack("patches.cache")
    shelf = cache.Shelf()
    closed = []
    monkeypatch.setattr(shelf._host, "close", lambda: closed.append(True))

    class Broken:
        def synchronize(self):
            raise RuntimeError("device lost")

    shelf._streams[torch.device("cpu")] = Broken()
    with pytest.raises(RuntimeError, match="device lost"):
        shelf.close()
    assert closed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_linear_forecast_stays_within_its_type(dtype, reuse, pack):
    """From 20000 to 50000 in half a step of the schedule leads to 80000, which float16 has not."""
    value = torch.tensor([20000.0, -20000.0, 1.0]).to(dtype)
    shelf = pack("patches.cache").Shelf()
    held = pack("patches.reuse").Held(shelf.keep(value * 2.5), 0.75, shelf.keep(value), 1.0)
    forecast = held.at(0.5)
    assert forecast.isfinite().all() and forecast.dtype == dtype
    largest = min(80000, torch.finfo(dtype).max)
    assert torch.allclose(forecast.double(), torch.tensor([largest, -largest, 4.0]).double(), rtol=0.01)
