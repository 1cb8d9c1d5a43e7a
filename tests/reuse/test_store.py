"""Host memory for kept values, and their packing."""

import threading
import time

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_keeps_every_vector_within_its_precision(dtype, pack):
    store = pack("patches.reuse.store")
    value = (
        torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 4, 5)[:, None]
    )
    value[0, 0], value[1, 1, 7] = 0, 6e4
    value = value.to(dtype)
    parts = store.pack(value)
    assert sum(part.nbytes for part in parts) == store.Store(precision=store.FP8).size_of(value)
    back = store.unpack(parts)
    assert back.dtype == dtype and back.isfinite().all()
    largest = value.abs().amax(dim=-1, keepdim=True).double()
    # 3 bits of mantissa, and a subnormal step of 2^-9 at a scale of largest / 448.
    allowed = value.abs().double() * 2**-4 * 1.05 + largest.clamp_min(448 * 2**-14) / 448 * 2**-9
    assert ((back - value).abs().double() <= allowed).all()


@pytest.mark.parametrize("piece", [100, 30_000, 2**15 + 1, 2**16, 2**16 + 4096])
def test_pinned_memory_wastes_nothing_and_hands_out_every_byte_once(piece, pack, monkeypatch):
    pinned = pack("patches.reuse.pinned")
    monkeypatch.setattr(pinned, "CHUNK", 2**16)
    room = pinned.PinnedMemory()
    room.grow(5 * piece, piece)
    ready = room.size
    assert 5 * piece <= ready < 5 * piece + max(pinned.CHUNK, pinned.aligned(piece)) + 5 * pinned.ALIGNMENT
    taken = [room.take(piece) for _ in range(5)]
    assert room.size == ready and all(piece <= buffer.nbytes < piece + pinned.ALIGNMENT for buffer in taken)
    other = room.take(piece + 1000)
    spans = sorted((buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in [*taken, other])
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    room.give_back(taken[2])
    assert room.take(piece).data_ptr() == taken[2].data_ptr()
    room.close()
    assert room.size == 0


def test_pinned_memory_unlocks_what_was_locked_and_asks_no_more_once_refused(pack, monkeypatch):
    pinned, locked, unlocked, asked = pack("patches.reuse.pinned"), [], [], []

    def pin_memory(chunk):
        asked.append(chunk)
        if len(asked) > 2:
            return False
        locked.append(chunk.data_ptr())
        return True

    monkeypatch.setattr(pinned.mm, "pin_memory", pin_memory)
    monkeypatch.setattr(pinned.mm, "unpin_memory", lambda chunk: unlocked.append(chunk.data_ptr()))
    monkeypatch.setattr(pinned, "CHUNK", 2**16)
    room = pinned.PinnedMemory()
    room.grow(5 * pinned.CHUNK, pinned.CHUNK)
    room.take(pinned.CHUNK)
    assert len(asked) == 3 and len(locked) == 2
    room.close()
    assert unlocked == locked


def test_pinned_memory_waits_for_the_system_only_where_memory_is_taken(pack, monkeypatch):
    """And locks what is there in the callers' thread."""
    pinned, locked, may_come = pack("patches.reuse.pinned"), [], threading.Event()

    def pin_memory(chunk):
        locked.append(threading.current_thread())
        return True

    def touched(chunk):
        may_come.wait(60)
        return original(chunk)

    original = pinned.touched
    monkeypatch.setattr(pinned, "touched", touched)
    monkeypatch.setattr(pinned.mm, "pin_memory", pin_memory)
    monkeypatch.setattr(pinned.mm, "unpin_memory", lambda chunk: True)
    monkeypatch.setattr(pinned, "CHUNK", 2**16)
    room = pinned.PinnedMemory()
    room.grow(3 * pinned.CHUNK, pinned.CHUNK)
    room.grow(5 * pinned.CHUNK, pinned.CHUNK)
    assert room.size == 5 * pinned.CHUNK and not locked
    threading.Timer(0.2, may_come.set).start()
    room.take(pinned.CHUNK)
    assert locked == [threading.current_thread()] * 5
    room.close()


def test_pinned_memory_locks_what_has_come_with_the_next_growth(pack, monkeypatch):
    pinned, locked = pack("patches.reuse.pinned"), []
    monkeypatch.setattr(pinned.mm, "pin_memory", lambda chunk: locked.append(chunk) or True)
    monkeypatch.setattr(pinned.mm, "unpin_memory", lambda chunk: True)
    room = pinned.PinnedMemory()
    room.grow(5 * pinned.PAGE, pinned.PAGE)
    for _ in range(6000):
        room.grow(room.size, pinned.PAGE)
        if locked:
            break
        time.sleep(0.01)
    assert sum(chunk.nbytes for chunk in locked) == room.size
    room.close()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_pinned_memory_serves_whatever_mode_it_is_asked_in(mode, pack):
    pinned = pack("patches.reuse.pinned")
    room = pinned.PinnedMemory()
    with mode():
        room.grow(3 * pinned.PAGE, pinned.PAGE)
        room.take(pinned.PAGE).copy_(torch.ones(pinned.PAGE, dtype=torch.uint8))
    room.take(pinned.PAGE)
    room.close()


def test_pinned_memory_closes_while_memory_comes(pack, monkeypatch):
    pinned = pack("patches.reuse.pinned")
    monkeypatch.setattr(pinned, "CHUNK", 2**16)
    room = pinned.PinnedMemory()
    room.grow(50 * pinned.CHUNK, pinned.CHUNK)
    room.close()
    room.close()
    assert room.size == 0


def test_every_page_is_touched(pack):
    pinned = pack("patches.reuse.pinned")
    chunk = torch.full((5 * pinned.PAGE + 1,), 7, dtype=torch.uint8)
    assert pinned.touched(chunk) is chunk and (chunk == 0).nonzero()[:, 0].tolist() == [
        pinned.PAGE * page for page in range(6)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_lie_one_behind_the_other(dtype, pack):
    """Also where a value has an odd count of numbers."""
    store = pack("patches.reuse.store")
    parts = store.pack(torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype))
    memory = torch.zeros(sum(part.nbytes for part in parts) + 9, dtype=torch.uint8)
    buffers = store.carved(memory, parts)
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part)
    assert torch.equal(store.unpack(buffers), store.unpack(parts))


def test_auto_goes_to_host_memory_once_the_gpu_has_none(pack, monkeypatch):
    store, asked = pack("patches.reuse.store"), []
    original = store.StoredTensor

    def kept(one, tensor, place, is_packed):
        asked.append(place)
        if asked.count(store.GPU) == 2 and place == store.GPU:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(one, tensor, place, is_packed)

    monkeypatch.setattr(store, "StoredTensor", kept)
    one = store.Store()
    places = [one.store(torch.ones(4)).place for _ in range(4)]
    assert places == [store.GPU, store.HOST, store.HOST, store.HOST]
    # Not asked again, and what could not be had is not reported.
    assert asked.count(store.GPU) == 2 and one.most == {store.GPU: 16, store.HOST: 48}


@pytest.mark.parametrize("placement", ["gpu", "cpu"])
def test_no_memory_anywhere(placement, pack, monkeypatch):
    store = pack("patches.reuse.store")

    def kept(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(store, "StoredTensor", kept)
    one = store.Store(placement)
    assert one.store(torch.ones(4)) is None and not one.taken.total() and not one.most.total()


def test_host_memory_is_let_go_even_if_a_stream_failed(pack, monkeypatch):
    store = pack("patches.reuse.store")
    closed = []
    monkeypatch.setattr(store.PinnedMemory, "close", lambda self: closed.append(True))

    class Broken:
        def __init__(self, device):
            pass

        def synchronize(self):
            raise RuntimeError("device lost")

    monkeypatch.setattr(torch.cuda, "Stream", Broken)
    one = store.Store()
    one.stream(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="device lost"):
        one.close()
    assert closed
