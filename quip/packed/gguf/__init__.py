"""Packed matrices of grids in .gguf files, for llama.cpp and its kin, every weight as it is."""
