"""How many parameters a model has, and how many operations a token costs. Arithmetic only."""

from __future__ import annotations

from math import prod

from megatrain.config.schema import LoraConfig, ModelConfig


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all projections, and the output head whether tied or not."""
    layer = sum(weight.numel(model.sizes) for weight in model.description.block.weights if weight.is_matrix)
    return model.num_hidden_layers * layer + model.hidden_size * model.known_vocab_size


def num_parameters(model: ModelConfig) -> int:
    """All parameters as a user counts them: unpadded vocabulary, tied weights once, the same under every layout."""
    family = model.description
    layer = sum(weight.numel(model.sizes) for weight in family.block.weights)
    others = sum(weight.numel(model.sizes) for outer in family.outer_layers for weight in outer.weights)
    shared = model.hidden_size * model.known_vocab_size if model.tie_word_embeddings else 0
    return model.num_hidden_layers * layer + others - shared


def num_trained_parameters(model: ModelConfig, lora: LoraConfig | None) -> int:
    """Those that are updated, and that a checkpoint holds: all, or the adapters'."""
    return num_parameters(model) if lora is None else sum(map(prod, adapter_shapes(model, lora).values()))


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every parameter of the adapters, in order."""
    block, sizes = model.description.block, {**model.sizes, "rank": lora.rank}
    weights = block.adapter_weights(lora.adapts)
    return {
        f"{block.prefix}.{number}.{weight.name}": weight.shape(sizes)
        for number in range(model.num_hidden_layers)
        for weight in weights
    }


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every parameter, in order, tied ones once."""
    family, sizes = model.description, model.sizes
    weights = [weight for embedding in family.embeddings for weight in embedding.weights]
    for number in range(model.num_hidden_layers):
        weights += [w._replace(name=f"{family.block.prefix}.{number}.{w.name}") for w in family.block.weights]
    weights += [*family.norm.weights, *(() if model.tie_word_embeddings else family.head.weights)]
    return {weight.name: weight.shape(sizes) for weight in weights}


def flops_of_weight(lora: LoraConfig | None) -> int:
    """FLOPs of forward and backward for one token and one element of the model's matrices: 2 for the product, and for
    the gradients of its input and of the weight. A frozen one has no gradient of its own (Schulman et al. 2025, "LoRA
    Without Regret": two thirds of the operations of full fine-tuning, and the adapters')."""
    return 6 if lora is None else 4


def flops_per_token(model: ModelConfig, seq_len: int, lora: LoraConfig | None = None) -> int:
    """FLOPs of forward and backward for one token: 6 a matrix parameter, and attention's 12 x layers x width x seq_len;
    with ``lora`` 4 a matrix parameter and 6 one of the adapters.

    The accounting of "PaLM" (arXiv:2204.02311, appendix B): no credit for causality, none for recomputation. A window
    that is shorter than ``seq_len`` stands in its place.
    """
    num_keys = min(seq_len, model.attention_window or seq_len)
    attention = 12 * model.num_hidden_layers * model.sizes["queries"] * num_keys
    adapters = 0 if lora is None else num_trained_parameters(model, lora)
    return flops_of_weight(lora) * matrix_parameters(model) + 6 * adapters + attention
