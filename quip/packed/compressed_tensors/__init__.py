"""Folders of compressed-tensors (vLLM, llm-compressor), format pack-quantized."""
