"""Models in .gguf files: all that such a file says of its model is read, or refused by name."""
