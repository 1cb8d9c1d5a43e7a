"""The nodes of the pack, one file each."""

from .apply_temporal_window import ApplyTemporalWindow

NODES = [ApplyTemporalWindow]
