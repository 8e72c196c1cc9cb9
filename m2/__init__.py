"""Monarch Mixer: Monarch matrices, long convolutions and the mixers built on them.

Source: Fu et al. 2023, arXiv:2310.12109.
"""

from m2.causal_monarch import causal_monarch as causal_monarch
from m2.causal_monarch import causal_monarch_factors as causal_monarch_factors
from m2.causal_monarch import causal_monarch_init as causal_monarch_init
from m2.conv import fft_conv as fft_conv
from m2.conv2d import fft_conv2d as fft_conv2d
from m2.filters import HyenaFilter as HyenaFilter
from m2.filters import HyenaFilter2D as HyenaFilter2D
from m2.filters import HyenaFilterConfig as HyenaFilterConfig
from m2.forward_mode import forward_mode as forward_mode
from m2.linear import BlockdiagLinear as BlockdiagLinear
from m2.linear import MonarchLinear as MonarchLinear
from m2.mixer import M2Config as M2Config
from m2.mixer import M2Mixer as M2Mixer
from m2.mixer import M2State as M2State
from m2.mlp import MonarchMLP as MonarchMLP
from m2.mlp import MonarchMLPConfig as MonarchMLPConfig
from m2.monarch import blockdiag_matmul as blockdiag_matmul
from m2.monarch import dft_factors as dft_factors
from m2.monarch import digit_reversal as digit_reversal
from m2.monarch import monarch_init as monarch_init
from m2.monarch import monarch_inverse as monarch_inverse
from m2.monarch import monarch_matmul as monarch_matmul
from m2.monarch import monarch_to_dense as monarch_to_dense
from m2.monarch import project_to_monarch as project_to_monarch
from m2.streaming import ConvState as ConvState
from m2.streaming import extend_conv as extend_conv
from m2.streaming import init_conv_state as init_conv_state
