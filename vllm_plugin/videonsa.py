"""Everything that the plug-in takes from VideoNSA itself: a name that changes there changes here, and nowhere else."""

from budget_videonsa import VideoPlan
from configuration_videonsa import VideoNSAConfig
from nsa_kernels.attention import SequenceLengths, nsa_attention
from positions_videonsa import mrope_position_ids
from processing_videonsa import VideoNSAProcessor

__all__ = [
    "SequenceLengths",
    "VideoNSAConfig",
    "VideoNSAProcessor",
    "VideoPlan",
    "mrope_position_ids",
    "nsa_attention",
]
