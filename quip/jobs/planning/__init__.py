"""Plans of mixed precision: what each matrix can have, what that costs, and what it does."""
