"""What quantization cost: measures of a whole model."""

from quip.evaluate.perplexity import perplexity

__all__ = ["perplexity"]
