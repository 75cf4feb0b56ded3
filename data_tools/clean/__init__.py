"""Cleaning text before it is tokenised: `dedup` and `filter`. docs/cleaning.md says what each does.

Both go the same way: every document gets attributes (`tag`), what is to be dropped is decided for the whole input, and
the rest is written (`output`), with a report of what was dropped and why.
"""
