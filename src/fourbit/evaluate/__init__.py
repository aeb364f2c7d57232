"""How good a model is: generated answers, likelihood of given labels, held-out loss.

    context.py       prompts prefilled in batches: one KV cache, rows of different lengths
    cache.py         a KV cache with room to grow
    attention.py     the attention used meanwhile
    batching.py      batches of similar length
    sampling.py      how the next token is drawn
    generate.py      answers in batches, or one of them streamed
    prompt_cache.py  what a model has read of one text, so that a longer one costs its new tokens only
    conversation.py  turns between a person and a base or its adapters
    labels.py        answers as the token ids that training trains
    trie.py          the labels of a closed set as a tree of tokens
    likelihood.py    the most likely label, exactly, without scoring every label
    scores.py        exact match, accuracy, what is taken for what
    metrics/         the other scores of answers, by name
    intervals.py     how sure a mean or a difference is
    confusion.py     labels against labels
    heldout.py       token-weighted loss and perplexity
    task.py          all of it on the rows of a file; result.py holds what it found
    questions.py     rows as multiple-choice questions
    choice.py        their likeliest letters, as MMLU is scored
    lm_eval.py       lm-eval-harness on a model as it is held here
    rowfile.py       the scores of the rows as a file
    kept.py          the newest scores of a run, in its folder

Nothing is imported here, so that the scores need neither torch nor transformers.
"""
