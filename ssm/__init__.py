"""Selective state-space models: pure operations with explicit state, and the mixers built on them."""

from ssm.bidirectional import Bidirectional as Bidirectional
from ssm.conv import causal_conv1d as causal_conv1d
from ssm.mamba import Mamba as Mamba
from ssm.mamba import MambaConfig as MambaConfig
from ssm.mamba import MambaState as MambaState
from ssm.mamba2 import Mamba2 as Mamba2
from ssm.mamba2 import Mamba2Config as Mamba2Config
from ssm.mamba2 import Mamba2State as Mamba2State
from ssm.mamba3 import Mamba3 as Mamba3
from ssm.mamba3 import Mamba3Config as Mamba3Config
from ssm.mamba3 import Mamba3State as Mamba3State
from ssm.mixer import Mixer as Mixer
from ssm.scan import selective_scan as selective_scan
from ssm.scan import selective_step as selective_step
from ssm.scan_order import ScanOrder as ScanOrder
from ssm.scan_order import merge_scans as merge_scans
from ssm.scan_order import scan_image as scan_image
from ssm.scan_order import scan_order as scan_order
from ssm.segments import segment_runs as segment_runs
from ssm.segments import segment_starts as segment_starts
from ssm.ssd import ssd as ssd
from ssm.ssd import ssd_step as ssd_step
from ssm.trapezoid import TrapezoidState as TrapezoidState
from ssm.trapezoid import trapezoid as trapezoid
from ssm.trapezoid import trapezoid_step as trapezoid_step
from ssm.vim import Vim as Vim
