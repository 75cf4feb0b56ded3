"""Tokenizers in the shapes of those that people bring along, small, made by the library itself."""

from __future__ import annotations

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["to", "be", "or", "not", "that", "is", "the", "question"]
LETTERS = [chr(code) for code in range(33, 127)]


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def byte_level(words: str, added: list[str | AddedToken], special: list[str]) -> Tokenizer:
    """Llama 3 and Qwen: all bytes, words by a pattern, control tokens outside of the model."""
    vocabulary = numbered([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "\u0120the"])
    model = models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("\u0120", "the")], ignore_merges=True)
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    return tokenizer


def llama3() -> Tokenizer:
    tokenizer = byte_level(LLAMA3_WORDS, [], ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.get_vocab_size() - 3)]
    )
    return tokenizer


def qwen3() -> Tokenizer:
    added = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<think>"]
    return byte_level(
        LLAMA3_WORDS.replace("{1,3}", ""),
        [AddedToken(token, special=False, normalized=False) for token in added],
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )


def spelled_out(tokens: list[str]) -> list[tuple[str, str]]:
    """Merges that spell tokens out from their left."""
    pairs = [(token[:end], token[end]) for token in tokens for end in range(1, len(token))]
    return list(dict.fromkeys(pairs))


def llama2(fallback: bool = True) -> Tokenizer:
    """SentencePiece's BPE: control tokens in the vocabulary of the model, bytes for what it does not know."""
    merges = spelled_out(["\u2581the", "\u2581not", "be"])
    tokens = ["<unk>", "<s>", "</s>", *(BYTES if fallback else []), "\u2581", *LETTERS]
    vocabulary = numbered([*tokens, *("".join(pair) for pair in merges)])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def gemma() -> Tokenizer:
    """Its vocabulary has control tokens and runs of line ends, and merges spell <eos> out."""
    merges = spelled_out(["\u2581the", "<eos>", "\n\n"])
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", *BYTES, "\u2581", "\n", *LETTERS]
    vocabulary = numbered([*tokens, *("".join(pair) for pair in merges)])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<mask>", "\n\n")])
    return tokenizer


def t5() -> Tokenizer:
    """Unigram, which looks for every piece of its vocabulary in the text."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{word}" for word in WORDS), *LETTERS, "<extra_id_0>"]
    scores = [0.0, 0.0, 0.0, -3.0, *(-4.0 for _ in WORDS), *(-8.0 for _ in LETTERS), 0.0]
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), 2))
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    return tokenizer


def bert() -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = numbered([*special, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)])
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # BERT's own never leaves a [SEP] whole
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(numbered(["<unk>", "<s>", "</s>", *WORDS]), "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


ENDS = {
    llama2: "</s>",
    llama3: "<|end_of_text|>",
    qwen3: "<|endoftext|>",
    gemma: "<eos>",
    t5: "</s>",
    bert: "[SEP]",
    word_level: "</s>",
}
"""Makers of all shapes, and the token that ends documents in each."""


def without_spaces(text: str) -> str:
    """What is to be the same of a text that was encoded and decoded by a tokenizer that is careless about spaces."""
    return re.sub(r"\s", "", text)
