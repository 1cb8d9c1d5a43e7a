"""The nodes of the pack, one file each."""

from .apply_temporal_window import ApplyTemporalWindow
from .attention_precision import ThriftAttentionPrecision
from .keyframe_stride import KeyframeStride
from .latent_flow_interpolate import LatentFlowInterpolate
from .load_optical_flow import ThriftLoadOpticalFlow
from .low_rank_attention import ThriftLowRankAttention
from .pace_gpu import ThriftPaceGPU
from .preset import ThriftPreset
from .schedule_spatial_freeze import ScheduleSpatialFreeze
from .thin_guide import ThriftThinGuide

NODES = [
    ApplyTemporalWindow,
    KeyframeStride,
    LatentFlowInterpolate,
    ScheduleSpatialFreeze,
    ThriftAttentionPrecision,
    ThriftLoadOpticalFlow,
    ThriftLowRankAttention,
    ThriftPaceGPU,
    ThriftPreset,
    ThriftThinGuide,
]
