"""Folders in the layout of exllamav3 (EXL3, turboderp on GitHub), read."""
