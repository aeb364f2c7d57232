"""One page about a run: its curves, what they say, and where it comes from.

    curves.py    the metrics of a run folder, read
    findings.py  what the curves say, each with the numbers it rests on
    chart.py     charts as inline SVG
    page.py      HTML pages that need no network
    evaluation.py  the scores that `fourbit eval` left, as a table
    masks.py     rows as tokens, the trained ones marked
    run.py       the page of a run folder

Nothing is imported here. Every text that comes from data or settings is escaped by the template engine.
"""
