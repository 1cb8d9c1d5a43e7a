"""LatentFlowInterpolate around a real VAE: frames, latents, audio, masks, and what it says when something is missing."""

from __future__ import annotations

import weakref

import comfy.model_management
import comfy.model_patcher
import comfy.nested_tensor
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("comfy.sd", reason="this ComfyUI tree has no VAE", exc_type=ImportError)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tiny):
    return tiny("vae").CodecVAE(zoom=1)


@pytest.fixture
def stride_node(pack):
    return pack("nodes.keyframe_stride").KeyframeStride


@pytest.fixture
def node(pack):
    return pack("nodes.latent_flow_interpolate").LatentFlowInterpolate


def moving(frames=33, size=64):
    """[F, H, W, 3]: a soft bright square that moves 16 pixels over the clip."""
    place = torch.arange(size)
    out = []
    for f in range(frames):
        x = (12 - (place - (20 + f / 2)).abs()).clamp(0, 4) / 4
        y = (12 - (place - size / 2).abs()).clamp(0, 4) / 4
        out.append(0.2 + 0.7 * x * y[:, None])
    return torch.stack(out)[..., None].expand(-1, -1, -1, 3)


def blocker(value):
    return type(value).__name__ == "ExecutionBlocker"


@pytest.fixture
def strided(vae, stride_node):
    """A real clip, thinned by the node itself: decoded, every second frame kept, encoded."""
    latent = {"samples": vae.encode(moving())}
    return stride_node.execute(any_model(), latent, 2, vae=vae).args[1]


def any_model():
    from tiny_models import build_model

    return build_model()


def raft_patcher():
    from torchvision.models.optical_flow import raft_small

    model = raft_small(weights=None, progress=False).eval()
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


@pytest.mark.parametrize("method", ["linear", "smooth", "motion"])
def test_a_clip_comes_back(node, strided, vae, method):
    latent, frames = node.execute(strided, method, vae=vae).args
    assert latent["samples"].shape == (1, 128, 5, 16, 16) and frames.shape == (33, 64, 64, 3)
    truth = moving()
    assert (frames - truth).square().mean() < 1e-3
    # Frames that were diffused are the decoded ones.
    assert torch.equal(frames[::2], vae.decode(strided["samples"])[0][:17])
    # The latent is those frames encoded, but for the first, which is untouched.
    assert torch.equal(latent["samples"][:, :, 0], strided["samples"][:, :, 0])
    assert torch.allclose(latent["samples"], vae.encode(frames), atol=1e-4)
    assert "frame_thrift_stride" not in latent and "frame_thrift_stride" in strided


def test_pixels_are_right_about_the_frames_inside_a_latent_and_latents_are_not(node, strided, vae):
    truth = moving()
    right = node.execute(strided, "motion", vae=vae).args[1]
    preview, no_images = node.execute(strided, "linear").args
    assert blocker(no_images) and "connect vae" in no_images.message
    assert preview["samples"].shape[2] == 5
    wrong = vae.decode(preview["samples"])[0]
    assert (wrong - truth).square().mean() > 10 * (right - truth).square().mean()


def test_without_encode_there_is_no_latent(node, strided, vae, monkeypatch):
    monkeypatch.setattr(vae, "encode", lambda *_: pytest.fail("encoded"))
    latent, frames = node.execute(strided, "linear", vae=vae, encode=False).args
    assert blocker(latent) and "encode" in latent.message and len(frames) == 33


def test_audio_and_the_first_mask_are_kept(node, stride_node, vae):
    audio = torch.randn(1, 8, 40, 16)
    samples = comfy.nested_tensor.NestedTensor((torch.zeros(1, 128, 5, 2, 2), audio))
    mask = torch.ones(1, 1, 5, 1, 1)
    mask[:, :, 0] = 0.25
    masks = comfy.nested_tensor.NestedTensor((mask, torch.ones(1, 1, 40, 16)))
    latent = stride_node.execute(any_model(), {"samples": samples, "noise_mask": masks}, 2).args[1]
    for connected in (None, vae):
        video, kept = node.execute(latent, "motion", vae=connected).args[0]["samples"].unbind()
        assert video.shape[2] == 5 and torch.equal(kept, audio)
        out = node.execute(latent, "motion", vae=connected).args[0]["noise_mask"].unbind()
        assert torch.equal(out[0], mask) and torch.equal(out[1], torch.ones(1, 1, 40, 16))


@pytest.mark.parametrize("settings", [{}, {"encode": False}, {"vae": None}])
def test_without_a_note_it_asks_before_any_work(node, vae, monkeypatch, settings):
    latent = {"samples": torch.randn(1, 128, 3, 2, 2)}
    monkeypatch.setattr(vae, "decode", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(ValueError, match="^stride: .*never strided, set 1"):
        node.execute(latent, "motion", **{"vae": vae, **settings})


def test_an_image_put_in_place_after_the_stride_does_not_halve_the_clip(node, vae, stride_node):
    """Core's node drops the note; with sound the sound's copy brings it back."""
    lt = pytest.importorskip("comfy_extras.nodes_lt")
    empty, sound = {"samples": torch.zeros(1, 128, 5, 16, 16)}, {"samples": torch.zeros(1, 8, 33, 16)}
    strided = stride_node.execute(any_model(), lt.LTXVConcatAVLatent.execute(empty, sound).args[0], 2).args[1]
    video, audio = lt.LTXVSeparateAVLatent.execute(strided).args
    placed = lt.LTXVImgToVideoInplace.execute(vae, moving(1), video, 1.0).args[0]
    with pytest.raises(ValueError, match="^stride: "):
        node.execute(placed, "linear")
    assert node.execute(placed, "linear", stride=2).args[0]["samples"].shape[2] == 5
    again = lt.LTXVConcatAVLatent.execute(placed, audio).args[0]
    assert node.execute(again, "linear").args[0]["samples"].unbind()[0].shape[2] == 5


def test_stride_1_by_hand_costs_no_encoding(node, vae, monkeypatch):
    monkeypatch.setattr(vae, "encode", lambda *_: pytest.fail("encoded"))
    latent = {"samples": torch.randn(1, 128, 3, 2, 2)}
    out, frames = node.execute(latent, "motion", vae=vae, stride=1).args
    assert out is latent and frames.shape[0] == 17


class ShortOfMemory:
    """Lets a codec run out of memory on more than `numbers` of its input at once, and notes what it was given."""

    def __init__(self, stage, name, numbers):
        self.run, self.numbers, self.given = getattr(stage, name), numbers, []

    def __call__(self, x, **kwargs):
        self.given.append(tuple(x.shape[2:]))
        if x.numel() > self.numbers:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return self.run(x, **kwargs)


@pytest.fixture
def large(pack, monkeypatch, vae):
    """A clip of four tiles in space and several pieces in time; the VAE that is asked for it."""
    monkeypatch.setattr(pack("latents.pixels"), "TILE_FRAMES", 16)
    monkeypatch.setattr(pack("latents.pixels"), "OVERLAP_FRAMES", 8)
    monkeypatch.setattr(vae, "memory_used_decode", lambda *_: 2**60)
    monkeypatch.setattr(vae, "memory_used_encode", lambda *_: 2**60)
    frames = torch.nn.functional.interpolate(moving(41).movedim(-1, 1), size=(320, 320)).movedim(1, -1)
    return frames, vae.encode(frames)


def test_the_whole_clip_is_decoded_first_whatever_was_estimated(pack, large, vae, monkeypatch):
    frames, video = large
    stage = ShortOfMemory(vae.first_stage_model, "decode", video.numel())
    monkeypatch.setattr(vae.first_stage_model, "decode", stage)
    assert torch.allclose(pack("latents.pixels").decode(vae, video)[0], frames, atol=1e-3)
    assert stage.given == [(6, 80, 80)]


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_tiles_in_space_come_before_pieces_in_time(pack, large, vae, monkeypatch, way, caplog):
    """And the same comes out of all three; of an encoder in pieces nearly, which begins each with a frame alone."""
    frames, video = large
    pixels = pack("latents.pixels")
    given, whole = (frames[None], video) if way == "encode" else (video, vae.decode(video))
    numbers, length = given.numel(), given.shape[1 if way == "encode" else 2]
    for share, lengths in ((0.75, {length}), (0.25, {length, 2, 9})):
        stage = ShortOfMemory(vae.first_stage_model, way, int(numbers * share))
        with monkeypatch.context() as patched:
            patched.setattr(vae.first_stage_model, way, stage)
            with torch.inference_mode():
                out = getattr(pixels, way)(vae, given)
        assert out.shape == whole.shape
        if share > 0.5 or way == "decode":
            assert torch.allclose(out, whole, atol=1e-3)
        assert stage.given[0][0] == length, "the whole first"
        assert {shape[0] for shape in stage.given} <= lengths, share
        assert (stage.given[-1][0] < length) == (share < 0.5) == ("seam" in caplog.text)
        assert len(stage.given) > 4


def test_other_errors_of_a_vae_are_not_taken_for_want_of_memory(pack, vae, monkeypatch):
    monkeypatch.setattr(vae, "decode", lambda *_: 1 / 0)
    monkeypatch.setattr(vae, "decode_tiled", lambda *_, **__: pytest.fail("tried again"))
    with pytest.raises(ZeroDivisionError):
        pack("latents.pixels").decode(vae, torch.zeros(1, 128, 2, 4, 4))


class OtherVAE:
    """What core says of a VAE of four frames, of one for images, and of one with other channels."""

    def __init__(self, channels, time):
        self.latent_channels, self.time = channels, time

    def temporal_compression_decode(self):
        return self.time

    def decode(self, *_):
        pytest.fail("work before the check")


@pytest.mark.parametrize(("channels", "time"), [(16, 4), (128, 4), (16, None), (16, 8)])
def test_a_vae_of_another_family_is_refused_by_name(node, stride_node, strided, channels, time):
    other = OtherVAE(channels, time)
    with pytest.raises(ValueError, match="^vae: expected one that makes 128 channels"):
        node.execute(strided, "motion", vae=other)
    with pytest.raises(ValueError, match="^vae: expected one that makes 128 channels"):
        stride_node.execute(any_model(), {"samples": torch.ones(1, 128, 5, 2, 2)}, 2, vae=other)


def test_a_real_vae_of_four_frames_is_refused(node, strided):
    import comfy.ldm.wan.vae
    import comfy.sd

    state = comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16).state_dict()
    try:
        wan = comfy.sd.VAE(sd=state)
    except Exception as error:
        pytest.skip(f"this tree builds no such VAE of this size: {error}")
    with pytest.raises(
        ValueError, match="^vae: expected one that makes 128 channels.*got 16 channels and 4 video"
    ):
        node.execute(strided, "motion", vae=wan)


@pytest.mark.parametrize("method", ["linear", "motion"])
def test_a_longer_clip_takes_no_more_memory_to_work_in(pack, method):
    """Frames go to the device segment by segment: the largest tensor made there does not grow with the clip."""
    interpolate, motion = pack("latents.interpolate"), pack("latents.motion")

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func is not torch.ops.aten.movedim.int:
                # Views of the whole clip are no memory.
                is_view = any(isinstance(a, torch.Tensor) and a.data_ptr() == out.data_ptr() for a in args)
                self.numbers = max(self.numbers, 0 if is_view else out.numel())
            return out

    def largest(frames):
        clip = torch.rand(1, 3, 1, 180, 320).expand(-1, -1, frames, -1, -1).contiguous()
        times, wanted = interpolate.frame_times(frames, 2), interpolate.frame_times(2 * frames - 1)
        with Largest() as seen:
            for _ in interpolate.in_between(clip, times, wanted, method, motion.estimate_motion):
                pass
        return seen.numbers

    assert largest(64) <= 1.01 * largest(32)


class Alive(TorchDispatchMode):
    """The most bytes in tensors made under it that were alive at the same time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                self.count(made.untyped_storage(), given)
        return out

    def count(self, storage, given):
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


@pytest.mark.parametrize(
    "shape", [(1, 3, 3, 1080, 1920), (1, 3, 20, 256, 256), (2, 3, 2, 480, 832), (1, 128, 9, 22, 40)]
)
def test_the_memory_that_motion_asks_for_is_what_it_takes(pack, shape):
    interpolate, motion = pack("latents.interpolate"), pack("latents.motion")
    clip = torch.rand(shape)
    times, wanted = interpolate.frame_times(shape[2], 2), interpolate.frame_times(2 * shape[2] - 1)
    with Alive() as alive:
        for _ in interpolate.in_between(clip, times, wanted, "motion", motion.estimate_motion):
            pass
    assert alive.peak < interpolate.memory_used(shape) < 2.5 * alive.peak


@pytest.mark.parametrize("with_vae", [True, False])
def test_room_is_asked_for_before_the_work(node, strided, vae, pack, monkeypatch, with_vae):
    interpolate, asked = pack("latents.interpolate"), []
    monkeypatch.setattr(
        comfy.model_management, "free_memory", lambda size, device, *_, **__: asked.append((size, device))
    )
    monkeypatch.setattr(interpolate, "in_between", lambda *_: pytest.fail("not asked") if not asked else [])
    monkeypatch.setattr(pack("latents.restore"), "in_between", interpolate.in_between)
    node.execute(strided, "motion", vae=vae if with_vae else None, encode=False)
    shape = (1, 3, 17, 64, 64) if with_vae else (1, 128, 3, 16, 16)
    assert (
        asked[-1][0] >= interpolate.memory_used(shape)
        and asked[-1][1] == comfy.model_management.get_torch_device()
    )


@pytest.mark.parametrize("size", [(704, 1280), (1088, 1920), (64, 64), (22, 40)])
def test_the_memory_that_raft_asks_for_covers_its_correlations(pack, size):
    raft, motion = pack("latents.raft"), pack("latents.motion")
    picture = motion.reduced(torch.empty(1, 1, *size, device="meta"))
    assert picture[0, 0].numel() <= motion.WORKING_PIXELS
    _, (height, width) = raft.working_size(*picture.shape[-2:])
    assert 3 * 4 * (height // 8 * (width // 8)) ** 2 < raft.memory_used(*size) < 2 * 2**30


def test_pictures_of_a_batch_do_not_see_each_other(pack):
    """Latents are shown to RAFT by the components of each pair alone."""
    raft = pack("latents.raft")
    a, b = (torch.randn(3, 16, 6, 7, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    together, alone = raft.three_components(a, b), raft.three_components(a[1:2], b[1:2])
    assert all(torch.allclose(x[1:2], y, atol=1e-5) for x, y in zip(together, alone, strict=True))
    assert together[0].shape == (3, 3, 6, 7) and together[0].min() >= 0 and together[1].max() <= 1


def test_batches_come_back_item_by_item(node, vae):
    latents = torch.cat([vae.encode(moving()), vae.encode(moving().flip(1))])
    both = node.execute({"samples": latents}, "motion", vae=vae, stride=2, length=57).args
    one = node.execute({"samples": latents[1:]}, "motion", vae=vae, stride=2, length=57).args
    assert both[1].shape[0] == 2 * 57
    assert torch.allclose(both[1][57:], one[1], atol=1e-4)


def test_optical_flow_without_a_model_says_what_it_needs(node, strided, vae, monkeypatch):
    monkeypatch.setattr(vae, "decode", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(ValueError, match=r"Load Optical Flow Model.*models/optical_flow"):
        node.execute(strided, "optical_flow", vae=vae)
    with pytest.raises(ValueError, match="expected torchvision's RAFT"):
        node.execute(strided, "optical_flow", vae=vae, optical_flow=any_model())


@pytest.mark.parametrize("with_vae", [True, False])
def test_optical_flow_runs_with_any_raft(node, strided, vae, with_vae):
    latent, _ = node.execute(
        strided, "optical_flow", vae=vae if with_vae else None, optical_flow=raft_patcher()
    ).args
    assert latent["samples"].shape[2] == 5 and latent["samples"].isfinite().all()


def test_an_interrupt_stops_it(node, strided, vae):
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            node.execute(strided, "motion", vae=vae)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert node.execute(strided, "motion", vae=vae).args[1].shape[0] == 33


def test_the_loader_knows_its_folder_beside_one_from_a_users_paths(pack, tmp_path, monkeypatch):
    """As extra_model_paths.yaml names it on releases whose core does not."""
    import folder_paths

    loader = pack("nodes.load_optical_flow")
    own, other = tmp_path / "models" / "optical_flow", tmp_path / "other"
    for folder, name in ((own, "raft.pth"), (other, "mine.safetensors"), (other, "readme.txt")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {loader.FOLDER: ([str(other)], set())})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert sorted(loader._files()) == ["mine.safetensors", "raft.pth"]


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_loader_reads_both_rafts_and_nothing_else(pack, tmp_path, monkeypatch, size):
    import folder_paths
    from safetensors.torch import save_file
    from torchvision.models import optical_flow

    loader = pack("nodes.load_optical_flow").ThriftLoadOpticalFlow
    loader.define_schema()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        "optical_flow",
        ([str(tmp_path)], folder_paths.supported_pt_extensions),
    )
    model = getattr(optical_flow, f"raft_{size}")(weights=None, progress=False)
    save_file(model.state_dict(), str(tmp_path / "flow.safetensors"))
    loaded = loader.execute("flow.safetensors").args[0]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)
    save_file({"other.weight": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="raft_small or raft_large"):
        loader.execute("other.safetensors")
    with pytest.raises(FileNotFoundError, match="models/optical_flow"):
        loader.execute("missing.safetensors")


def shown_small(frames, size=32):
    return torch.nn.functional.interpolate(frames.movedim(-1, 1), size=(size, size), mode="area").movedim(
        1, -1
    )


def there_and_back(frames=33, size=64, far=16, period=8):
    """[F, H, W, 3]: a square that is back where it was every so many frames, over a pattern."""
    whole = moving(4 * far, size)
    return whole[[round(far * (1 - abs(1 - f % period / (period / 2)))) for f in range(frames)]]


@pytest.fixture
def by_eights(vae, stride_node):
    latent = {"samples": vae.encode(there_and_back(65))}
    return stride_node.execute(any_model(), latent, 8, vae=vae).args[1]


def test_frames_follow_a_reference(node, by_eights, vae, caplog):
    truth = there_and_back(65)
    caplog.set_level("INFO")
    blind = node.execute(by_eights, "motion", vae=vae, encode=False).args[1]
    frames = node.execute(by_eights, "motion", vae=vae, encode=False, reference=shown_small(truth)).args[1]
    error, blind_error = ((out - truth).square().mean() for out in (frames, blind))
    assert error < blind_error / 10
    assert torch.equal(frames[::8], blind[::8]), "what was sampled stays, bit for bit"
    (told,) = [line for line in caplog.messages if "keyframes the reference is shifted by" in line]
    assert "at 9 keyframes" in told and "56 of 56 frames follow it" in told


def test_without_a_reference_everything_is_as_it_was(node, strided, vae):
    latent, frames = node.execute(strided, "motion", vae=vae).args
    again, same = node.execute(strided, "motion", vae=vae, reference=None).args
    assert torch.equal(frames, same) and torch.equal(latent["samples"], again["samples"])
    assert node.define_schema().inputs[-1].id == "reference", "saved workflows keep their order"


@pytest.mark.parametrize("step", [2, 4])
def test_a_first_stage_that_was_strided_itself_guides_its_own_frames(node, by_eights, vae, caplog, step):
    caplog.set_level("INFO")
    truth = there_and_back(65)
    reference = shown_small(truth)[::step]
    frames = node.execute(by_eights, "linear", vae=vae, encode=False, reference=reference).args[1]
    blind = node.execute(by_eights, "linear", vae=vae, encode=False).args[1]
    own = [f for f in range(65) if f % step == 0 and f % 8]
    assert (frames - truth)[own].square().mean() < (blind - truth)[own].square().mean() / 5
    assert f"{len(own)} of {len(own)} frames follow it" in caplog.text
    # Those between are made from both beside, by the method.
    middle = (frames[4] + frames[4 + step]) / 2 if step == 2 else (frames[0] + frames[4]) / 2
    assert torch.allclose(frames[5 if step == 2 else 2], middle, atol=1e-5)


def test_a_stride_that_does_not_divide_the_clip(node, stride_node, vae):
    """121 frames at stride 4 and 8: the last keyframes lie past the end of the reference, and repeat its last frame."""
    truth = moving(41)
    latent = {"samples": vae.encode(truth)}
    thinned = stride_node.execute(any_model(), latent, 4, vae=vae).args[1]
    assert thinned["samples"].shape[2] == 3
    frames = node.execute(thinned, "motion", vae=vae, encode=False, reference=shown_small(truth)).args[1]
    assert len(frames) == 41 and (frames - truth).square().mean() < 1e-4
    thinned = {"samples": vae.encode(moving(49)[::3]), "frame_thrift_stride": {"stride": 3, "frames": 6, "strided_frames": 3}}  # fmt: skip
    frames = node.execute(thinned, "motion", vae=vae, encode=False, reference=shown_small(moving(41))).args[1]
    assert len(frames) == 41


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (torch.zeros(32, 32, 32, 3), "^reference: expected the same clip's 33 frames, got 32 frames.*Keyframe Stride"),
        (torch.zeros(1, 32, 32, 3), "^reference: .*got 1 frames"),
        (torch.zeros(33, 32, 36, 3), "^reference: .*64 × 64, got 36 × 32.*uncropped"),
        (torch.zeros(33, 12, 12, 3), "^reference: .*a quarter.*got 12 × 12"),
        (torch.zeros(33, 128, 128, 3), "^reference: .*got 128 × 128"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_reference_says_why_before_any_work(
    node, strided, vae, monkeypatch, reference, words
):
    monkeypatch.setattr(vae, "decode", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(ValueError, match=words):
        node.execute(strided, "motion", vae=vae, reference=reference)


def test_a_reference_needs_a_vae(node, strided):
    with pytest.raises(ValueError, match="^reference: .*Connect vae"):
        node.execute(strided, "motion", reference=torch.zeros(33, 32, 32, 3))


def test_where_nothing_is_to_be_made_the_reference_is_not_used_and_that_is_told(node, strided, vae, caplog):
    caplog.set_level("INFO")
    latent = {"samples": torch.rand(1, 128, 3, 16, 16)}
    node.execute(latent, "motion", vae=vae, stride=1, reference=torch.zeros(5, 8, 8, 3))
    assert caplog.text.count("reference is not used") == 1
    own = node.execute(strided, "motion", vae=vae, encode=False, reference=shown_small(moving())[:17]).args[1]
    assert "none in between" in caplog.text
    assert torch.equal(own, node.execute(strided, "motion", vae=vae, encode=False).args[1])


def test_a_reference_of_another_clip_warns_and_is_not_followed(node, strided, vae, caplog):
    reference = torch.rand(33, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    reference = torch.nn.functional.interpolate(reference.movedim(-1, 1), size=(32, 32)).movedim(1, -1)
    frames = node.execute(strided, "motion", vae=vae, encode=False, reference=reference).args[1]
    assert torch.equal(frames, node.execute(strided, "motion", vae=vae, encode=False).args[1])
    (warned,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "at keyframes 0, 2, 4" in warned and "more than 50 %" in warned and "Connect frames" in warned


def test_a_late_reference_warns_and_is_not_followed(node, stride_node, vae, caplog):
    """Its keyframes are somewhere else each time. Elsewhere it is like another clip's, of which no second line tells."""
    whole = there_and_back(65, period=26)
    by_fours = stride_node.execute(any_model(), {"samples": vae.encode(whole)}, 4, vae=vae).args[1]
    caplog.clear()
    reference = shown_small(whole)[[max(0, f - 2) for f in range(65)]]
    frames = node.execute(by_fours, "motion", vae=vae, encode=False, reference=reference).args[1]
    assert torch.equal(frames, node.execute(by_fours, "motion", vae=vae, encode=False).args[1])
    (warned,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "Interpolate: the keyframes fit" in warned and "about 2 frames later" in warned


def test_of_a_batch_the_late_ones_are_named(node, stride_node, vae, caplog):
    whole = there_and_back(65, period=26)
    latents = torch.cat([vae.encode(whole)] * 3)
    by_fours = stride_node.execute(any_model(), {"samples": latents}, 4, vae=vae).args[1]
    caplog.clear()
    small = shown_small(whole)
    references = [small[[min(max(0, f - late), 64) for f in range(65)]] for late in (0, 2, -2)]
    node.execute(by_fours, "motion", vae=vae, encode=False, reference=torch.cat(references))
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert "clip 2 of 3: the keyframes fit" in warned[0] and "2 frames later" in warned[0]
    assert "clip 3 of 3: the keyframes fit" in warned[1] and "2 frames earlier" in warned[1]


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_references(node, strided, vae, channels):
    truth = moving()
    given = shown_small(truth)
    reference = given[..., :1] if channels == 1 else torch.cat((given, torch.rand(33, 32, 32, 1)), dim=-1)
    three, other = (
        node.execute(strided, "motion", vae=vae, encode=False, reference=image).args[1]
        for image in (given, reference)
    )
    assert torch.allclose(three, other, atol=1e-6)


def test_a_batch_has_its_references_one_after_the_other(node, vae):
    latents = torch.cat([vae.encode(moving()), vae.encode(moving().flip(1))])
    settings = {"vae": vae, "stride": 2, "length": 65, "encode": False}
    whole = moving(65)
    references = [shown_small(whole), shown_small(whole.flip(1))]
    both = node.execute({"samples": latents}, "motion", reference=torch.cat(references), **settings).args[1]
    one = node.execute({"samples": latents[1:]}, "motion", reference=references[1], **settings).args[1]
    assert torch.allclose(both[65:], one, atol=1e-4)
    with pytest.raises(ValueError, match="65 frames for each of the 2 clips.*got 65"):
        node.execute({"samples": latents}, "motion", reference=references[0], **settings)


def test_an_interrupt_stops_it_with_a_reference(node, strided, vae):
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            node.execute(strided, "motion", vae=vae, reference=shown_small(moving()))
    finally:
        comfy.model_management.interrupt_current_processing(False)


def test_the_memory_that_following_asks_for_is_what_it_takes(pack):
    guided, shape, gap = pack("latents.guided"), (1, 3, 3, 256, 256), 8
    clip, frames = torch.rand(shape), (shape[2] - 1) * gap + 1
    small = torch.nn.functional.avg_pool3d(clip, (1, 2, 2)).repeat_interleave(gap, dim=2)[:, :, :frames]
    with Alive() as alive:
        for _ in guided.follow(
            clip, gap, guided.Reference(small, 1), list(range(gap + 1)), None, guided.Comparison()
        ):
            pass
    assert alive.peak < guided.memory_used(shape) < 4 * alive.peak
