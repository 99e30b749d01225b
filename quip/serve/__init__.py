"""A packed model answers: text from it, here and in the engines people run."""
