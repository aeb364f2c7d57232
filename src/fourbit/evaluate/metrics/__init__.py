"""Scores of one answer against its reference, each from 0 to 1; the names are those of `eval.metrics`.

    text.py       contains, regex (exact_match is in evaluate/scores.py)
    number.py     number: the final number, for maths
    structure.py  json_valid, json_match
    overlap.py    rouge_l, token_f1: shared words, for summaries and question answering
    metric.py     all of them by name, and their means with intervals

None needs torch or transformers.
"""
