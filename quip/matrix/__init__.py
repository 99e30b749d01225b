"""One matrix: W and H become codes. Every method runs through one loop, sweep.py."""
