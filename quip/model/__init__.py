"""Any decoder, one block at a time: load it, walk it, quantize it, tune it."""
