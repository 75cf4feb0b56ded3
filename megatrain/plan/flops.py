"""How many parameters a model has, and how many operations a token costs. Arithmetic only."""

from __future__ import annotations

from megatrain.config.schema import ModelConfig


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all projections, and the output head whether tied or not."""
    return model.num_hidden_layers * _layer_matrices(model) + model.hidden_size * _vocab_size(model)


def num_parameters(model: ModelConfig) -> int:
    """All parameters as a user counts them: unpadded vocabulary, tied weights once, the same under every layout."""
    hidden = model.hidden_size
    if model.family == "gpt2":
        # LayerNorm: weight and bias. Biases: query, key, value; attention's output; both of the MLP.
        layer_vectors = 2 * 2 * hidden + (3 * hidden + hidden + model.ffn_size + hidden)
        final_norm = 2 * hidden
        positions = model.max_position_embeddings * hidden
    else:
        head_norms = 2 * model.head_size if model.family == "qwen3" else 0
        layer_vectors, final_norm, positions = 2 * hidden + head_norms, hidden, 0
    embedding = _vocab_size(model) * hidden
    head = 0 if model.tie_word_embeddings else embedding
    layers = model.num_hidden_layers * (_layer_matrices(model) + layer_vectors)
    return embedding + positions + layers + final_norm + head


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """FLOPs of forward and backward for one token: 6 a matrix parameter, and attention's 12 x layers x width x seq_len.

    The accounting of "PaLM" (arXiv:2204.02311, appendix B): no credit for causality, none for recomputation.
    """
    attention = 12 * model.num_hidden_layers * model.num_attention_heads * model.head_size * seq_len
    return 6 * matrix_parameters(model) + attention


def _layer_matrices(model: ModelConfig) -> int:
    """Matrix parameters of one decoder layer: query, key, value, output, and the MLP's two or (gated) three."""
    attention = 2 * (model.num_attention_heads + model.kv_heads) * model.head_size * model.hidden_size
    num_mlp_matrices = 2 if model.family == "gpt2" else 3
    return attention + num_mlp_matrices * model.hidden_size * model.ffn_size


def _vocab_size(model: ModelConfig) -> int:
    if model.vocab_size is None:
        raise ValueError("model.vocab_size must be known before parameters can be counted")
    return model.vocab_size
