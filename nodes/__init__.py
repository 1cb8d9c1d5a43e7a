"""The nodes of the pack, one file each."""

from .apply_temporal_window import ApplyTemporalWindow
from .keyframe_stride import KeyframeStride
from .latent_flow_interpolate import LatentFlowInterpolate
from .load_optical_flow import ThriftLoadOpticalFlow
from .pace_gpu import ThriftPaceGPU
from .schedule_spatial_freeze import ScheduleSpatialFreeze
from .thin_guide import ThriftThinGuide

NODES = [
    ApplyTemporalWindow,
    KeyframeStride,
    LatentFlowInterpolate,
    ScheduleSpatialFreeze,
    ThriftLoadOpticalFlow,
    ThriftPaceGPU,
    ThriftThinGuide,
]
