"""Whole models: where the Monarch Mixer, state spaces and attention meet."""

from zoo.attention import Attention as Attention
from zoo.attention import AttentionConfig as AttentionConfig
from zoo.backbone import Backbone as Backbone
from zoo.backbone import BackboneConfig as BackboneConfig
from zoo.backbone import Block as Block
from zoo.backbone import parse_pattern as parse_pattern
from zoo.encoder import Encoder as Encoder
from zoo.encoder import EncoderConfig as EncoderConfig
from zoo.encoder import MaskedLM as MaskedLM
from zoo.encoder import MaskedLMConfig as MaskedLMConfig
from zoo.encoder import SequenceClassifier as SequenceClassifier
from zoo.encoder import SequenceClassifierConfig as SequenceClassifierConfig
from zoo.generate import Sampling as Sampling
from zoo.generate import generate as generate
from zoo.generate import generate_stream as generate_stream
from zoo.mlp import MLP as MLP
from zoo.mlp import MLPConfig as MLPConfig
from zoo.models import CausalLM as CausalLM
from zoo.models import CausalLMConfig as CausalLMConfig
from zoo.models import TokenConfig as TokenConfig
from zoo.presets import create as create
from zoo.presets import presets as presets
from zoo.pretrained import from_pretrained as from_pretrained
from zoo.pretrained import save_pretrained as save_pretrained
from zoo.pretrained import shard_largest as shard_largest
