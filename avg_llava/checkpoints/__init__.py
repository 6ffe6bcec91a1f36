"""Files of weights: reading published layouts, loading, quantization, the model without its language model."""
