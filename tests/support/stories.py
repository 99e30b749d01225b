"""Files of stories, each with two endings, in the form of StoryCloze."""

import csv

from quip.evaluate.cloze import ANSWER, TEXTS

STORY = ("id", "One.", "Two.", "Three.", "Four.", "So, it ended.", "It went on.", "2")


def write_stories(path, rows, columns=("InputStoryid", *TEXTS, ANSWER)):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path
