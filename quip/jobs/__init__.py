"""From names to folders: run, collect Hessians, evaluate, tune, export, inspect."""
