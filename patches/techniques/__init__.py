"""Every technique, in the order of their stages. A new one is a file here and a line in this table."""

from .attention_precision import AttentionPrecision
from .keyframe_stride import StretchedTimes
from .low_rank import LowRankAttention
from .pacing import GpuPacing
from .spatial_freeze import SpatialFreeze
from .temporal_window import TemporalWindow

TECHNIQUES = (
    StretchedTimes,
    SpatialFreeze,
    TemporalWindow,
    LowRankAttention,
    AttentionPrecision,
    GpuPacing,
)
