"""Multiply a few vectors by a matrix of packed codes of integer grids."""
