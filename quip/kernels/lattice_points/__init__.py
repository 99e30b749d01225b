"""The nearest points of the lattices E8P and E81B, and the points of codes."""
