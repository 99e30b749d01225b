"""What attacks quip: processes that are watched, damage to files, and mistaken command lines."""
