"""Round the columns of a panel in order, each with the errors of those before it."""
