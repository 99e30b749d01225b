"""The research bench: what the papers claim, measured here."""
