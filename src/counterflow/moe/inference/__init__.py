"""A whole decoder at work, without gradient: prompts into a cache, then token by token, in one or two micro-batches."""
