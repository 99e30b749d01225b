"""Folders of GPTQ (AutoGPTQ, GPTQModel), checkpoint formats gptq and gptq_v2."""
