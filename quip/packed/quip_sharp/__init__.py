"""Folders in the published layout of QuIP# (relaxml on the Hugging Face Hub), read and written."""
