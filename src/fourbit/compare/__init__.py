"""Trainings side by side: the same rows, the same held-out rows, the same seeds, one process each.

    arms.py        what is compared: a name and the settings it changes
    rows.py        the rows of a comparison, split and drawn once
    arm.py         one training and its score, in a process of its own
    runner.py      all of them, one after another, resumable
    statistics.py  intervals and tests, paired over seeds and over rows
    result.py      what came out, arm by arm and pair by pair
    page.py        the page

Nothing is imported here.
"""
