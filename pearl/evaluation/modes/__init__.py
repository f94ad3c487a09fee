"""How a model is made to answer: `direct`, `tools`, `latent`. One file a mode; `base` says what a mode is."""

from pearl.evaluation.modes.base import DecodingMode
from pearl.evaluation.modes.direct import Direct
from pearl.evaluation.modes.latent import Latent
from pearl.evaluation.modes.tools import ToolUse

__all__ = ["DecodingMode", "Direct", "Latent", "ToolUse"]
