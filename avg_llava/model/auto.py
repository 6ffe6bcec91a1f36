"""The classes that transformers' Auto classes load, from this package or from the modelling files of a saved model."""

from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.processing import AvgLlavaImageProcessor, AvgLlavaProcessor

__all__ = ["AvgLlavaConfig", "AvgLlavaForConditionalGeneration", "AvgLlavaImageProcessor", "AvgLlavaProcessor"]
