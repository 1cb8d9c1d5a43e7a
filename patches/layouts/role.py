"""Who attends to whom in one attention call."""

from enum import Enum


class Role(Enum):
    VIDEO_SELF = "video self-attention"
    VIDEO_TEXT = "video to text"
    AUDIO_SELF = "audio self-attention"
    AUDIO_TEXT = "audio to text"
    VIDEO_AUDIO = "video to audio"
    AUDIO_VIDEO = "audio to video"

    @property
    def has_video_queries(self) -> bool:
        return self in (Role.VIDEO_SELF, Role.VIDEO_TEXT, Role.VIDEO_AUDIO)

    @property
    def has_video_keys(self) -> bool:
        return self in (Role.VIDEO_SELF, Role.AUDIO_VIDEO)
