"""The tables of the papers: each described as data, run cell by cell, shown beside the papers'."""
