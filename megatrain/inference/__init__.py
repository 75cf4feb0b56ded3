"""A trained model in use: loaded from a checkpoint, with its tokenizer and its ends of text; the text it writes."""
