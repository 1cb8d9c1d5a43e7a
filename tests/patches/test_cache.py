"""Host memory for kept values, and their packing."""

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
    assert sum(part.nbytes for part in parts) == cache.packed_size(value)
    back = cache.unpack(parts)
    assert back.dtype == dtype and back.isfinite().all()
    largest = value.abs().amax(dim=-1, keepdim=True).double()
    # 3 bits of mantissa, and a subnormal step of 2^-9 at a scale of largest / 448.
    allowed = value.abs().double() * 2**-4 * 1.05 + largest.clamp_min(448 * 2**-14) / 448 * 2**-9
    assert ((back - value).abs().double() <= allowed).all()


def test_host_room_hands_out_every_byte_once(pack):
    host = pack("patches.host")
    room = host.HostRoom()
    room.grow(host.CHUNK + 1)
    assert room.size == 2 * host.CHUNK
    sizes = [host.CHUNK // 2 + 1, host.CHUNK // 2, 100, host.CHUNK, host.CHUNK + 1000]
    taken = [room.take(size) for size in sizes]
    assert all(buffer.nbytes >= size for buffer, size in zip(taken, sizes, strict=True))
    spans = sorted((buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in taken)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    room.give_back(taken[2])
    assert room.take(100).data_ptr() == taken[2].data_ptr()
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
    room = host.HostRoom()
    room.grow(5 * host.CHUNK)
    assert len(asked) == 3 and len(locked) == 2
    room.close()
    assert unlocked == locked
