"""How many parameters a model has, and how many operations a token costs. Arithmetic only."""

from __future__ import annotations

from math import prod

from megatrain.config.schema import LoraConfig, ModelConfig


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that tokens are multiplied with: all projections, and the output head whether tied or not."""
    layer = sum(weight.numel(model.sizes) for weight in model.description.block.weights if weight.is_matrix)
    return model.num_hidden_layers * layer + head_parameters(model)


def head_parameters(model: ModelConfig) -> int:
    """Of them, those of the head, and of what transforms its input."""
    model.known_vocab_size  # noqa: B018 (raises where it is not known)
    weights = (weight for layer in model.description.last_layers for weight in layer.weights if weight.is_matrix)
    return sum(weight.numel(model.sizes) for weight in weights)


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
    weights = [weight for layer in family.first_layers for weight in layer.weights]
    for number in range(model.num_hidden_layers):
        weights += [w._replace(name=f"{family.block.prefix}.{number}.{w.name}") for w in family.block.weights]
    weights += [weight for layer in family.last_layers[:-1] for weight in layer.weights]
    weights += family.head.weights[int(model.tie_word_embeddings) :]  # the matrix comes first
    return {weight.name: weight.shape(sizes) for weight in weights}


def flops_of_weight(lora: LoraConfig | None) -> int:
    """FLOPs of forward and backward for one token and one element of the model's matrices: 2 for the product, and for
    the gradients of its input and of the weight. A frozen one has no gradient of its own (Schulman et al. 2025, "LoRA
    Without Regret": two thirds of the operations of full fine-tuning, and the adapters')."""
    return 6 if lora is None else 4


def flops_of_head(model: ModelConfig, lora: LoraConfig | None, asked: float) -> int:
    """Of ``flops_per_token`` the head's."""
    flops = flops_of_weight(lora) * head_parameters(model)
    return flops if asked == 1.0 else round(flops * asked)


def flops_per_token(model: ModelConfig, seq_len: int, lora: LoraConfig | None = None, asked: float = 1.0) -> int:
    """FLOPs of forward and backward for one token: 6 a matrix parameter, and attention's 12 x layers x width x seq_len;
    with ``lora`` 4 a matrix parameter and 6 one of the adapters. ``asked``: the share of the tokens that the head sees.

    The accounting of "PaLM" (arXiv:2204.02311, appendix B): no credit for causality, none for recomputation. A window
    that is shorter than ``seq_len`` stands in its place.
    """
    num_keys = min(seq_len, model.attention_window or seq_len)
    attention = 12 * model.num_hidden_layers * model.sizes["queries"] * num_keys
    adapters = 0 if lora is None else num_trained_parameters(model, lora)
    in_layers = flops_of_weight(lora) * (matrix_parameters(model) - head_parameters(model))
    return in_layers + flops_of_head(model, lora, asked) + 6 * adapters + attention
