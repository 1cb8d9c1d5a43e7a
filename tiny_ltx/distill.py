"""Few-step distillation on the student's own trajectories, with guidance folded in.

Every clip in the buffers is a state somewhere on its schedule. The teacher goes from there to the next sigma in small
guided steps, the student learns the one velocity that leads to the same place, and the state then moves on by what the
student said: so it learns to correct its own errors, too. A simple relative of progressive distillation (Salimans and Ho,
2022, https://arxiv.org/abs/2202.00512).
"""

from __future__ import annotations

from typing import Any

import torch

from .captions import embed_captions
from .clips import FULL, SMALL
from .model import REFINER_SIGMAS, REFINING_CFG, STUDENT_RECIPE, TEACHER_RECIPE, read_weights
from .trainer import IMAGE_SHARE, Clipset, Trainer, build_model

# Teacher steps inside one step of the student, of second order.
SUBSTEPS = 3
# Where new states of small clips begin: most skip the first four sigmas, which hardly differ from each other.
LATE_START = 4
EARLY_SHARE = 0.3
# New states of large clips: most come from a small clip made larger, as in use; the others from a large one.
UPSCALED_SHARE = 0.7
SCHEDULES = {SMALL: (STUDENT_RECIPE.sigmas,), FULL: tuple(REFINER_SIGMAS.values())}
GUIDANCE = {SMALL: TEACHER_RECIPE.cfg, FULL: REFINING_CFG}


class States(Clipset):
    """Clips on their way along a schedule of few steps."""

    def __init__(
        self, size: int, model: Any, teacher: Any, scale: float, device: torch.device, is_compiled: bool
    ):
        super().__init__(size, model, scale, device, is_compiled)
        self.teacher = self.twin_of(teacher, is_compiled)
        longest = max(len(sigmas) for sigmas in SCHEDULES[size])
        # Shorter ones stay at zero, so that the step after their last would lead nowhere.
        self.sigmas = torch.zeros(len(SCHEDULES[size]), longest, device=device)
        for row, sigmas in zip(self.sigmas, SCHEDULES[size], strict=True):
            row[: len(sigmas)] = torch.tensor(sigmas)
        self.schedule = torch.zeros(self.twin.clips, dtype=torch.int64, device=device)
        # Past the end, so that the first draw replaces every state.
        self.position = torch.full((self.twin.clips,), longest - 1, device=device)
        self.is_image = torch.zeros(self.twin.clips, dtype=torch.bool, device=device)

    def draw(self, generator: torch.Generator, fps_range: tuple[float, float]) -> None:
        """Puts new states where clips have reached the end of their schedule."""
        clips, device, frame_clip = self.twin.clips, self.device, self.twin.frame_clip
        is_done = self.sigmas[self.schedule, self.position] == 0
        scenes = self.draw_scenes(generator, fps_range)
        start = self.rows_of(scenes, self.size)
        chance = torch.rand(2, clips, generator=generator, device=device)
        schedule = torch.randint(len(self.sigmas), (clips,), generator=generator, device=device)
        is_image = chance[0] < IMAGE_SHARE
        is_clean = is_image[frame_clip] & self.is_first
        if self.size == SMALL:
            position = torch.where(chance[1] < EARLY_SHARE, 0, LATE_START)
        else:
            position = torch.zeros_like(schedule)
            # The image of image-to-video is put into the second stage at its full size.
            is_soft = (chance[1] < UPSCALED_SHARE)[frame_clip] & ~is_clean
            start = torch.where(is_soft[:, None, None], self.rows_of(scenes, SMALL), start)
        noise = torch.randn(start.shape, generator=generator, device=device)
        level = self.sigmas[schedule, position][frame_clip].masked_fill(is_clean, 0.0)[:, None, None]
        state = (1 - level) * start + level * noise
        self.rows.copy_(torch.where(is_done[frame_clip][:, None, None], state, self.rows))
        ids = torch.cat([scene.ids for scene in scenes])
        fps = torch.cat([scene.fps for scene in scenes])
        self.ids.copy_(torch.where(is_done[:, None], ids, self.ids))
        for buffer, new in (
            (self.fps, fps),
            (self.schedule, schedule),
            (self.position, position),
            (self.is_image, is_image),
        ):
            buffer.copy_(torch.where(is_done, new, buffer))

    def lose(self) -> torch.Tensor:
        """Loss of one step of every state; moves the states on."""
        frame_clip = self.twin.frame_clip
        is_clean = self.is_image[frame_clip] & self.is_first
        now, after = (
            self.sigmas[self.schedule, self.position + i][frame_clip].masked_fill(is_clean, 0.0)
            for i in (0, 1)
        )
        length = (after - now)[:, None, None]
        goal = self.follow_teacher(now, after)
        # A copy, because the state moves on before the backward pass has read it.
        velocity = self.twin(self.rows.clone(), now, embed_captions(self.ids), self.fps)
        wanted = (goal - self.rows) / length.masked_fill(is_clean[:, None, None], 1.0)
        # Between equal weight for velocities, which early steps would fill, and for the places they lead to.
        weight = length.abs().sqrt()[:, 0, 0]
        error = (velocity - wanted).square().mean(dim=(1, 2))
        with torch.no_grad():
            self.rows.add_(velocity.detach() * length)
            self.position.add_(1)
        return (error * weight).sum() / weight.sum()

    @torch.no_grad()
    def follow_teacher(self, now: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Rows where the guided teacher arrives from the present ones, by Adams-Bashforth steps of second order."""
        x, step = self.rows, (after - now) / SUBSTEPS
        given = embed_captions(self.ids)
        empty = embed_captions(self.ids, torch.ones_like(self.is_image))
        before = None
        for i in range(SUBSTEPS):
            sigma = now + i * step
            unguided = self.teacher(x, sigma, empty, self.fps)
            guided = self.teacher(x, sigma, given, self.fps)
            velocity = unguided + GUIDANCE[self.size] * (guided - unguided)
            slope = velocity if before is None else 1.5 * velocity - 0.5 * before
            x, before = x + step[:, None, None] * slope, velocity
        return x


class Distiller(Trainer):
    """Trains a difference from the teacher that samples in few steps, without guidance."""

    def clipset(self, size: int) -> Clipset:
        teacher = build_model(self.device, self.args.seed)
        teacher.load_state_dict(read_weights("teacher")[0])
        teacher.eval().requires_grad_(False)
        return States(size, self.model, teacher, self.args.scale, self.device, self.is_compiled)
