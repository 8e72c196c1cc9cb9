"""Selective state-space models: pure operations with explicit state, and the mixers built on them."""

from ssm.conv import causal_conv1d as causal_conv1d
from ssm.mamba import Mamba as Mamba
from ssm.mamba import MambaConfig as MambaConfig
from ssm.mamba import MambaState as MambaState
from ssm.scan import selective_scan as selective_scan
from ssm.scan import selective_step as selective_step
from ssm.segments import segment_runs as segment_runs
from ssm.segments import segment_starts as segment_starts
from ssm.ssd import ssd as ssd
from ssm.ssd import ssd_step as ssd_step
