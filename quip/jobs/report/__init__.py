"""What is written down of a job: run.json, tables, plots, and the card of a checkpoint."""
