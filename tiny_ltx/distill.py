"""Few-step distillation on the student's own trajectories, with guidance folded in.

Every clip in the buffers is a state somewhere on the student's schedule. The teacher goes from there to the
next sigma in small guided steps, the student learns the one velocity that leads to the same place, and the
state then moves on by what the student said: so it learns to correct its own errors, too. A simple relative
of progressive distillation (Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch

from .captions import embed_captions
from .model import STUDENT_RECIPE, TEACHER_RECIPE, read_weights
from .trainer import IMAGE_SHARE, Trainer
from .twin import Twin

# Teacher steps inside one step of the student, of second order.
SUBSTEPS = 3
# Where new states begin: most skip the first four sigmas, which hardly differ from each other.
LATE_START = 4
EARLY_SHARE = 0.3


class Distiller(Trainer):
    """Trains a copy of the teacher to sample in the few steps of STUDENT_RECIPE, without guidance."""

    ema_decay = 0.998

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        super().__init__(args, device)
        teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        state, _ = read_weights(Path(args.teacher))
        teacher.load_state_dict({key: value.float() for key, value in state.items()})
        self.teacher = Twin(
            teacher, self.groups, self.twin.grid, device, self.twin.dtype, self.twin.is_compiled
        )
        self.sigmas = torch.tensor(STUDENT_RECIPE.sigmas, device=device)
        # Past the end, so that the first draw replaces every state.
        self.position = torch.full((self.twin.clips,), len(self.sigmas) - 1, device=device)
        self.is_image = torch.zeros(self.twin.clips, dtype=torch.bool, device=device)

    @torch.no_grad()
    def draw(self) -> None:
        """Puts new states where clips have reached the end of the schedule."""
        clips, device, frame_clip = self.twin.clips, self.device, self.twin.frame_clip
        is_done = self.position >= len(self.sigmas) - 1
        real, ids, fps = self.draw_real()
        is_early = torch.rand(clips, generator=self.generator, device=device) < EARLY_SHARE
        position = torch.where(is_early, 0, LATE_START)
        is_image = torch.rand(clips, generator=self.generator, device=device) < IMAGE_SHARE
        noise = torch.randn(real.shape, generator=self.generator, device=device)
        level = self.sigmas[position][frame_clip]
        level = level.masked_fill(is_image[frame_clip] & self.is_first, 0.0)[:, None, None]
        state = (1 - level) * real + level * noise
        self.rows.copy_(torch.where(is_done[frame_clip][:, None, None], state, self.rows))
        self.ids.copy_(torch.where(is_done[:, None], ids, self.ids))
        self.fps.copy_(torch.where(is_done, fps, self.fps))
        self.position.copy_(torch.where(is_done, position, self.position))
        self.is_image.copy_(torch.where(is_done, is_image, self.is_image))

    def lose(self) -> torch.Tensor:
        """Loss of one step of every state; moves the states on."""
        frame_clip = self.twin.frame_clip
        is_clean = self.is_image[frame_clip] & self.is_first
        now, after = (self.sigmas[self.position + i][frame_clip].masked_fill(is_clean, 0.0) for i in (0, 1))
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
            velocity = unguided + TEACHER_RECIPE.cfg * (self.teacher(x, sigma, given, self.fps) - unguided)
            slope = velocity if before is None else 1.5 * velocity - 0.5 * before
            x, before = x + step[:, None, None] * slope, velocity
        return x
