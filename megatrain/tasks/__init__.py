"""Few-shot evaluation: tasks of the user's own, scored as in the GPT-3 paper (Brown et al. 2020, section 2.4)."""
