"""What a technique may be: each of these is a few lines in this file, and the machinery knows none of them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from freezing import SIGMAS
from reference import close, equal, masked_model, set_slot
from tiny_models import FAMILIES, FORMS, build_model, conditioning, noise_like, sample

TEXT = 5


@pytest.fixture
def made(pack):
    """`made(name, stage, hooks, roles=(), **state)`: a technique of these hooks, mounted on a model."""
    technique = pack("patches.technique")
    mount, Role = pack("patches.mount").mount, pack("patches.layouts.role").Role

    def make(model, name, stage, kind, roles=(), unit=None, **settings):
        @dataclass(frozen=True)
        class Made(technique.Technique):
            def begin(self, run):
                return kind(self, run)

        Made.name, Made.stage, Made.roles = name, stage, frozenset(Role[role] for role in roles)
        if unit is not None:
            Made.unit = unit
        return mount(model, Made(**settings))

    return make


@pytest.fixture
def State(pack):
    return pack("patches.technique").State


@pytest.fixture
def entry(pack):
    """`entry(model, name)`: a technique's part of the last record."""
    journal_of = pack("patches.mount").journal_of
    return lambda model, name: journal_of(model).records()[-1]["techniques"][name]


def test_one_that_does_nothing_sees_the_segments_as_the_window_left_them(made, State, windowed, entry, pack):
    model, seen = build_model(), []

    class Looking(State):
        def see(self, segments, attention):
            seen.append(segments)
            return segments

    tokens = pack("patches.kernels.tokens").VideoTokens.grid(9, 2, 3)
    left = pack("patches.kernels.window").window_segments(tokens, 1, 0)
    for over in (30, 10):
        seen.clear()
        ours = made(windowed(model), "looking", over, Looking, ["VIDEO_SELF"])
        assert equal(sample(ours), sample(windowed(model))) and not equal(sample(ours), sample(model))
        assert len(seen) == 2 * 9 and all((segments == left) is (over == 30) for segments in seen)
        assert entry(ours, "looking")["declined"] == {"UNCHANGED": 9}


def slots(change):
    """In the override slot: `change(q, k, v, mask, role)` of every attention call, for a reference."""

    def override(func, q, k, v, heads, mask=None, *args, **kwargs):
        role = "VIDEO_SELF" if q.shape[1] == k.shape[1] else "VIDEO_TEXT"
        return change(partial(func, heads=heads, **kwargs), q, k, v, mask, role)

    return override


def test_role_video_text(made, State, entry, pack):
    """Frames from the fifth on see the first two of five text tokens."""
    model, kernel = build_model(), pack("patches.kernels.segments")

    class Deaf(State):
        def see(self, segments, attention):
            half = attention.tokens.offsets[4]
            parts = (
                kernel.Segment(0, half, ((0, TEXT),)),
                kernel.Segment(half, attention.tokens.total, ((0, 2),)),
            )
            return kernel.Segments(parts, TEXT)

    def cut(func, q, k, v, mask, role):
        if role == "VIDEO_SELF":
            return func(q, k, v, mask=mask)
        near, far = func(q[:, :24], k, v, mask=mask), func(q[:, 24:], k[:, :2], v[:, :2], mask=mask[..., :2])
        return torch.cat([near, far], dim=1)

    ours = made(model, "deaf", 40, Deaf, ["VIDEO_TEXT"])
    result = sample(ours)
    assert close(result, sample(set_slot(model, slots(cut)))) and not close(result, sample(model))
    assert entry(ours, "deaf")["taken"] == 9 and not entry(ours, "deaf")["declined"]


def test_two_roles_at_once_and_the_share_of_self_attention(made, State, windowed, entry, last_run, pack):
    model, seen = build_model(), []

    class Halved(State):
        def attend(self, attention, inner):
            seen.append(attention.site.role.name)
            return inner(attention) * 0.5

    def halve(func, q, k, v, mask, role):
        return func(q, k, v, mask=mask) * 0.5

    ours = made(model, "halved", 40, Halved, ["VIDEO_SELF", "VIDEO_TEXT"])
    result = sample(ours)
    assert close(result, sample(set_slot(model, slots(halve)))) and not close(result, sample(model))
    assert seen.count("VIDEO_SELF") == seen.count("VIDEO_TEXT") == 9 and entry(ours, "halved")["taken"] == 18

    def share(model):
        return pack("patches.mount").journal_of(model).records()[-1]["attention_share"]

    assert share(ours) == 1
    both, alone = made(windowed(model), "halved", 40, Halved, ["VIDEO_SELF", "VIDEO_TEXT"]), windowed(model)
    for one in (both, alone):
        sample(one)
    assert share(both) == share(alone) < 1


def test_one_may_decline_a_single_attention_call(made, State, entry):
    model = build_model()

    class Picky(State):
        def attend(self, attention, inner):
            return "ODD_BLOCK" if attention.site.block % 2 else inner(attention)

        def backend(self, attention, inner):
            return "NEVER"

    ours = made(model, "picky", 40, Picky, ["VIDEO_SELF"])
    assert equal(sample(ours), sample(model))
    assert entry(ours, "picky")["taken"] == 6 and entry(ours, "picky")["declined"] == {"ODD_BLOCK": 3}


def test_the_backend_is_told_every_segment(made, State, windowed, entry):
    model, shapes = build_model(), []

    class Exact(State):
        def backend(self, attention, inner):
            shapes.append(attention.k.shape[1])
            return inner(attention)

    ours = made(windowed(model), "exact", 50, Exact, ["VIDEO_SELF"])
    assert equal(sample(ours), sample(windowed(model)))
    assert set(shapes) == {18} and entry(ours, "exact")["taken"] == 9


def test_no_schedule(made, State, entry, pack):
    """It acts in every step, and one with a schedule in its own."""
    model = build_model()

    class Silent(State):
        def attend(self, attention, inner):
            return torch.zeros_like(attention.q)

    always = made(model, "silent", 40, Silent, ["VIDEO_TEXT"])
    late = made(
        model, "silent", 40, Silent, ["VIDEO_TEXT"], schedule=pack("patches.clock").Schedule(0.5, 1.0)
    )
    for ours, steps in ((always, [0, 1, 2]), (late, [1, 2])):
        assert not equal(sample(ours), sample(model))
        told = entry(ours, "silent")
        assert told["steps"] == steps and told["taken"] == 3 * len(steps)
        assert told["declined"] == ({} if len(steps) == 3 else {"OUTSIDE_RANGE": 3})


def test_one_that_acts_only_after_a_call(made, State, entry):
    model, steps = build_model(), []

    class Counting(State):
        def called(self, call, error):
            steps.append((call.step, error))
            return [None]

    ours = made(model, "counting", 40, Counting)
    assert equal(sample(ours), sample(model))
    assert steps == [(0, None), (1, None), (2, None)] and entry(ours, "counting")["taken"] == 3


def test_one_that_waits_at_every_step(made, State, entry, pack):
    model, waited = build_model(), []

    class Waiting(State):
        def step(self, step):
            waited.append(step.number)

        def stepped(self, step):
            time.sleep(0.05)
            waited.append(step.number)

    ours = made(model, "waiting", 60, Waiting, unit="steps")
    begin = time.perf_counter()
    assert equal(sample(ours), sample(model))
    assert time.perf_counter() - begin > 0.15 and waited == [0, 0, 1, 1, 2, 2]
    assert entry(ours, "waiting")["taken"] == 3
    by_step = pack("patches.mount").journal_of(ours).records()[-1]["by_step"]
    assert [step["outcomes"]["waiting"]["taken"] for step in by_step] == [1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["per-frame work", "whole blocks"])
@pytest.mark.parametrize("stage", [15, 8])
def test_one_that_replaces_a_module_inside_those_of_freeze(scope, stage, family, made, State, frozen, entry):
    """Later stages lie inside: frozen steps do not reach them. Earlier ones lie around: what they add is not frozen."""
    model, calls = build_model(family), []

    def bent(original, x, *args, **kwargs):
        calls.append(1)
        return original(x, *args, **kwargs).tanh()

    class Bending(State):
        def modules(self, call):
            yield call.layout.per_frame_work(call.layout.blocks[1])["ff"], bent

    def patched(patcher):
        clone, feed = patcher.clone(), patcher.model.diffusion_model.transformer_blocks[1].ff
        clone.add_object_patch("diffusion_model.transformer_blocks.1.ff.forward", partial(bent, feed.forward))
        return clone

    one = frozen(made(model, "bending", stage, Bending), scope=scope)
    other = made(frozen(model, scope=scope), "bending", stage, Bending)
    result = sample(one, family, sigmas=SIGMAS)
    is_inside = stage > 10 or scope == "whole blocks"
    assert len(calls) == (4 if is_inside else 8)
    assert equal(result, sample(other, family, sigmas=SIGMAS))
    assert equal(result, sample(frozen(patched(model), scope=scope), family, sigmas=SIGMAS)) is is_inside
    assert not equal(result, sample(frozen(model, scope=scope), family, sigmas=SIGMAS))
    assert entry(one, "bending")["taken"] == 8


class Kept:
    """By hand: block 1 computes odd frames, block 2 even ones, and tokens behind the frames in both."""

    def __init__(self, frames, per_frame, guides=0):
        self.total = frames * per_frame + guides
        behind = list(range(frames * per_frame, self.total))
        self.rows = [
            torch.tensor([n for n in range(frames * per_frame) if n // per_frame % 2 == parity] + behind)
            for parity in (1, 0)
        ]

    def cut(self, value, rows):
        if isinstance(value, (tuple, list)):
            return tuple(self.cut(part, rows) for part in value)
        if isinstance(value, torch.Tensor):
            dim = next((dim for dim in (1, 2) if value.ndim > dim and value.shape[dim] == self.total), None)
            return value if dim is None else value.index_select(dim, rows)
        if hasattr(value, "expand_for_computation") and value.expand().shape[1] == self.total:
            return type(value)(value.expand().index_select(1, rows), 1)
        return value

    def forward(self, original, rows, stream, **kwargs):
        is_pair = isinstance(stream, tuple)
        video = (stream[0] if is_pair else stream).clone()
        of_video = {name for name in kwargs if name in ("timestep", "pe") or name.startswith("v_")} - {
            "v_context"
        }
        given = {name: self.cut(value, rows) if name in of_video else value for name, value in kwargs.items()}
        part = video.index_select(1, rows)
        out = original((part, stream[1]) if is_pair else part, **given)
        video[:, rows] = out[0] if is_pair else out
        return (video, out[1]) if is_pair else video

    def patch(self, model):
        clone = model.clone()
        for index, rows in zip((1, 2), self.rows, strict=True):
            block = model.model.diffusion_model.transformer_blocks[index]
            clone.add_object_patch(
                f"diffusion_model.transformer_blocks.{index}.forward",
                partial(self.forward, block.forward, rows),
            )
        return clone


@pytest.fixture
def alternating(made, State):
    class Alternating(State):
        def modules(self, call):
            for index, parity in ((1, 1), (2, 0)):
                frames = range(parity, call.tokens.frames, 2)
                yield call.layout.blocks[index], partial(call.on_frames, self, frames)

    return lambda model: made(model, "alternating", 12, Alternating)


@pytest.mark.parametrize("family", FORMS)
def test_odd_frames_in_one_block_and_even_frames_in_the_next(family, alternating, entry):
    model = build_model(family)
    ours = alternating(model)
    result = sample(ours, family)
    assert close(result, sample(Kept(9, 6).patch(model), family)) and not close(result, sample(model, family))
    assert entry(ours, "alternating")["taken"] == 3 and not entry(ours, "alternating")["declined"]


@pytest.mark.parametrize("family", FORMS)
def test_some_frames_of_a_picture_that_is_kept(family, alternating):
    """Every token has a timestep of its own then."""
    model, mask = build_model(family), torch.ones(1, 1, 9, 1, 1)
    mask[:, :, 0] = 0.0
    given = {"noise_mask": mask, "cfg": 1.0}
    result = sample(alternating(model), family, **given)
    assert close(result, sample(Kept(9, 6).patch(model), family, **given))
    assert not close(result, sample(model, family, **given))


def test_some_frames_beside_guides_under_the_window(alternating, windowed, last_run, pack):
    """The window sees the frames that are there; guides of their own strength bring masks."""
    values = {"keyframe_idxs": torch.zeros(1, 3, 6, 2)}
    given = {"positive": conditioning(**values), "negative": conditioning(seed=7, **values)}
    given["noise_mask"] = torch.ones(1, 1, 10, 1, 1)
    noise, model = noise_like(shape=(10, 2, 3)), build_model()
    ours = alternating(model)
    reference = Kept(9, 6, guides=6).patch(model)
    assert close(sample(ours, noise=noise, **given), sample(reference, noise=noise, **given))
    both = windowed(ours)
    assert not equal(sample(ours, noise=noise, **given), sample(both, noise=noise, **given))
    # 9, 4 and 5 frames: ±1 covers none of them.
    assert last_run(both)["taken"] == 9 and not last_run(both)["declined"]


def test_one_that_asks_for_memory_and_frees_it(made, State, windowed, entry, caplog):
    """Before loading, and when memory runs out; then the forward begins again, and what it had counted is forgotten."""
    model, told, shapes, failing = build_model(), [], [], [True]

    class Hoarding(State):
        hoard = None

        def wants(self, load):
            return 3 * load.numbers * load.width

        def granted(self, room):
            self.hoard = torch.zeros(7)
            told.append((room.device > 0, room.host > 0))

        def called(self, call, error):
            told.append((call.step, type(error).__name__))
            return []

        def relieve(self, call):
            has_hoard, self.hoard = self.hoard is not None, None
            return has_hoard

    def prepare(executor, model, noise_shape, *args, **kwargs):
        shapes.append(tuple(noise_shape))
        return executor(model, noise_shape, *args, **kwargs)

    def run_out(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        if failing:
            failing.clear()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out

    ours = made(windowed(model), "hoarding", 40, Hoarding)
    ours.add_wrapper_with_key("prepare_sampling", "look", prepare)
    ours.add_wrapper_with_key("diffusion_model", "run out", run_out)
    assert equal(sample(ours), sample(windowed(model)))
    assert shapes[0][:-1] == (1, 128, 9, 2) and shapes[0][-1] > 3
    assert told == [(True, True), (0, "OutOfMemoryError"), (0, "NoneType"), (1, "NoneType"), (2, "NoneType")]
    assert entry(ours, "temporal window")["taken"] == 9, "not those of the forward that failed"
    failing.append(True)
    again = made(windowed(model), "hoarding", 40, type("Mean", (Hoarding,), {"relieve": lambda *_: False}))
    again.add_wrapper_with_key("diffusion_model", "run out", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        sample(again)


@pytest.mark.parametrize("hook", ["called", "relieve"])
def test_one_that_cannot_let_go_hides_no_error(hook, made, State, caplog):
    class Broken(State):
        def called(self, call, error):
            if error is not None and hook == "called":
                raise ValueError("mine")
            return []

        def relieve(self, call):
            raise ValueError("mine")

    def run_out(executor, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    ours = made(build_model(), "broken", 40, Broken)
    ours.add_wrapper_with_key("diffusion_model", "run out", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        sample(ours)
    assert "broken could not let go" in caplog.text


def test_one_whose_record_fails_costs_no_run(made, State, pack):
    class Broken(State):
        def attend(self, attention, inner):
            return inner(attention) * 0.5

        def record(self):
            raise ValueError("mine")

    model = build_model()
    ours = made(model, "broken", 40, Broken, ["VIDEO_SELF"])
    assert not equal(sample(ours), sample(model)) and not pack("patches.mount").journal_of(ours).records()


def test_stages_narrow_what_those_before_them_left(made, State, windowed, pack):
    """Before the window somebody hides the last frame from all others: nobody sees it, whatever the window shows."""
    model, seen, kernel = build_model(), [], pack("patches.kernels.segments")

    class Hiding(State):
        def see(self, segments, attention):
            *_, start, stop = attention.tokens.offsets
            parts = kernel.Segment(0, start, ((0, start),)), kernel.Segment(start, stop, ((0, stop),))
            return segments.narrowed(kernel.Segments(parts, stop))

    class Looking(State):
        def see(self, segments, attention):
            seen.append(segments)
            return segments

    ours = made(
        made(windowed(model, sink_frames=1), "hiding", 15, Hiding, ["VIDEO_SELF"]),
        "looking",
        30,
        Looking,
        ["VIDEO_SELF"],
    )
    visible = torch.zeros(54, 54, dtype=torch.bool)
    for frame in range(9):
        low = min(max(frame - 1, 0), 6)
        for other in {0, low, low + 1, low + 2}:
            if other < 8 or frame == 8:
                visible[6 * frame : 6 * frame + 6, 6 * other : 6 * other + 6] = True
    assert close(sample(ours), sample(masked_model(model, visible)))
    assert not close(sample(ours), sample(windowed(model, sink_frames=1)))
    for segments in seen:
        for part in segments.parts:
            columns = {column for a, b in part.keys for column in range(a, b)}
            assert columns == set(visible[part.start].nonzero()[:, 0].tolist())


def test_options_that_change_behind_those_of_comfyui(made, State, entry):
    model, seen = build_model(), []

    class Telling(State):
        def forward(self, call):
            return {"told": call.step}

    def look(executor, *args, **kwargs):
        seen.append(next(given for given in (*args, *kwargs.values()) if isinstance(given, dict)).get("told"))
        return executor(*args, **kwargs)

    ours = made(model, "telling", 40, Telling)
    ours.add_wrapper_with_key("diffusion_model", "look", look)
    sample(ours)
    assert seen == [0, 1, 2]


def test_a_forward_in_which_nothing_acts_binds_nothing(made, State, windowed, frozen, pack):
    """And is counted once, in the unit of the technique."""
    model, shadowed = build_model(), []
    ours = frozen(windowed(model, start_percent=0.85), start_percent=0.85)
    module = model.model.diffusion_model

    def look(*_):
        shadowed.append(sum("forward" in vars(part) for part in module.modules()))

    module.transformer_blocks[0].register_forward_pre_hook(look)
    sample(ours, sigmas=SIGMAS)
    told = pack("patches.mount").journal_of(ours).records()[-1]
    first = told["techniques"]["temporal window"]["steps"][0]
    # The forecast stores the step before the range, where the window does not act yet.
    assert first > 2 and [bool(count) for count in shadowed] == [False] * (first - 1) + [True] * (9 - first)
    assert told["techniques"]["temporal window"]["declined"] == {"OUTSIDE_RANGE": first * 3}
    assert [step["outcomes"]["spatial freeze"] for step in told["by_step"][:2]] == [
        {"taken": 0, "declined": {"OUTSIDE_RANGE": 1}}
    ] * 2


def test_one_that_counts_nothing_is_no_warning(made, State, caplog):
    class Idle(State):
        pass

    with caplog.at_level(logging.INFO):
        sample(made(build_model(), "idle", 40, Idle))
    lines = [record for record in caplog.records if "idle" in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.INFO]


class TestFewWords:
    """A family that tells of its blocks, attention and tokens only."""

    @pytest.fixture(autouse=True)
    def family(self, pack, monkeypatch):
        layouts, ltx = pack("patches.layouts"), pack("patches.layouts.ltx")

        class Short(pack("patches.layouts.layout").Layout):
            def __init__(self, whole):
                self.whole = whole

            @property
            def blocks(self):
                return self.whole.blocks

            def sites(self):
                return self.whole.sites()

            def video_tokens(self):
                return self.whole.video_tokens()

        family = SimpleNamespace(read=lambda *given: Short(ltx.read(*given)), stream_of=ltx.stream_of)
        monkeypatch.setattr(layouts, "FAMILIES", (family,))

    def test_the_window_acts(self, windowed, last_run, pack):
        model = build_model()
        ours = windowed(model)
        assert not equal(sample(ours), sample(model)) and last_run(ours)["taken"] == 9
        assert pack("patches.mount").journal_of(ours).records()[-1]["work_share"] is None

    @pytest.mark.parametrize("scope", ["per-frame work", "whole blocks"])
    def test_what_has_to_know_more_declines(self, scope, frozen, alternating, record, entry, pack):
        model = build_model()
        ours = frozen(model, scope=scope)
        assert equal(sample(ours, sigmas=SIGMAS), sample(model, sigmas=SIGMAS))
        assert record(ours)["declined"] == {"UNCLEAR_LAYOUT": 8}
        some = alternating(model)
        assert equal(sample(some), sample(model)) and entry(some, "alternating")["declined"] == {
            "UNCLEAR_LAYOUT": 6
        }
        node, latent = pack("nodes").KeyframeStride, {"samples": torch.zeros(1, 128, 17, 2, 3)}
        strided = node.execute(model, latent, 2).args[0]
        assert equal(sample(strided), sample(model))
        assert entry(strided, "keyframe stride")["declined"] == {"UNCLEAR_LAYOUT": 3}
