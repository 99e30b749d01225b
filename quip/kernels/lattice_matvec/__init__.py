"""Multiply a few vectors by a matrix of packed lattice codes."""
