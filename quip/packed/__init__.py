"""A quantized matrix: as a value, as a module of a model, and as a file."""
