"""From files to batches: read, render with the chat template, mask, and order.

    row.py          one record and where it stands; why it cannot be trained
    read.py         files to rows (lines.py: JSON and text; tables.py: CSV, Parquet, `datasets` folders;
                    packed.py: compressed files)
    forms.py        rows to conversations, prompt and completion, or documents, by their column names
    turns.py        what one turn of a conversation says: thinking, content, tool calls
    template.py     conversations to text, and which characters of it the assistant wrote
    tokens.py       text to token ids and the characters each token covers
    render.py       the three together: one row to an `Example`, ids and mask
    hub.py          addresses of data sets on the hub
    examples.py     encoded rows in compact form, in memory or in a file
    encode.py       many rows to an `Encoded`; the prompt alone, for evaluation; the held-out split
    cache.py        encoded rows kept on disk from run to run
    truncate.py     rows that are too long
    fingerprint.py  hashes that find equal rows
    gate.py         all that a run reads, trains on and holds out, with a report
    view.py         examples for people: tokens as text, and a page of them
    order.py        permutations that are the same on every machine
    batch.py        examples to optimizer steps, micro-batches and padded tensors
    pack.py         examples end to end instead of padded

Nothing is imported here, so that reading files needs neither torch nor transformers.
"""
