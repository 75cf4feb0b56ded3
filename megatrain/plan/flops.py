"""How many parameters a model has, and how many operations a token costs. Arithmetic only."""

from __future__ import annotations

from math import prod

from megatrain.config.schema import LoraConfig, ModelConfig
from megatrain.families.description import PatchEmbedding, Stack, Weight


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters that tokens are multiplied with: all projections, of patches too, and the output head whether tied or
    not."""
    layers = sum(model.num_layers(stack) * _matrices(model, stack) for stack in model.description.stacks)
    patches = sum(e.product.numel(model.sizes) for e in model.description.embeddings if isinstance(e, PatchEmbedding))
    return layers + head_parameters(model) + patches


def _matrices(model: ModelConfig, stack: Stack) -> int:
    """Elements of the matrices of one of a stack's layers."""
    return sum(weight.numel(model.sizes) for weight in stack.block.weights if weight.is_matrix)


def head_parameters(model: ModelConfig) -> int:
    """Of them, those of the head, and of what transforms its input."""
    model.known_vocab_size  # noqa: B018 (raises where it is not known)
    weights = (weight for layer in model.description.last_layers for weight in layer.weights if weight.is_matrix)
    return sum(weight.numel(model.sizes) for weight in weights)


def num_parameters(model: ModelConfig) -> int:
    """All parameters as a user counts them: unpadded vocabulary, tied weights once, the same under every layout."""
    family, sizes = model.description, model.sizes
    layers = sum(model.num_layers(s) * sum(weight.numel(sizes) for weight in s.block.weights) for s in family.stacks)
    others = sum(weight.numel(sizes) for outer in family.outer_layers for weight in outer.weights)
    shared = model.hidden_size * model.known_vocab_size if model.is_tied else 0
    return layers + others - shared


def num_trained_parameters(model: ModelConfig, lora: LoraConfig | None) -> int:
    """Those that are updated, and that a checkpoint holds: all, or the adapters'."""
    return num_parameters(model) if lora is None else sum(map(prod, adapter_shapes(model, lora).values()))


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every parameter of the adapters, in order."""
    sizes = {**model.sizes, "rank": lora.rank}
    return {
        f"{stack.block.prefix}.{number}.{weight.name}": weight.shape(sizes)
        for stack in model.description.stacks
        for number in range(model.num_layers(stack))
        for weight in stack.block.adapter_weights(lora.adapts)
    }


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every parameter, in order, tied ones once."""
    family, sizes = model.description, model.sizes
    weights: list[Weight] = []
    for stack in family.stacks:
        before = (layer for layer in stack.outer_layers if layer is not stack.norm)
        weights += [weight for layer in before for weight in layer.weights]
        for number in range(model.num_layers(stack)):
            weights += [w._replace(name=f"{stack.block.prefix}.{number}.{w.name}") for w in stack.block.weights]
        weights += stack.norm.weights if stack.norm else ()
    weights += family.head_transform.weights if family.head_transform else ()
    weights += family.head.weights[int(model.is_tied) :]  # the matrix comes first
    return {weight.name: weight.shape(sizes) for weight in weights}


def flops_of_weight(lora: LoraConfig | None) -> int:
    """FLOPs of forward and backward for one token and one element of the model's matrices: 2 for the product, and for
    the gradients of its input and of the weight. A frozen one has no gradient of its own (Schulman et al. 2025, "LoRA
    Without Regret": two thirds of the operations of full fine-tuning, and the adapters')."""
    return 6 if lora is None else 4


def flops_of_head(model: ModelConfig, lora: LoraConfig | None, predicted: float) -> int:
    """Of ``flops_per_token`` the head's."""
    flops = flops_of_weight(lora) * head_parameters(model)
    return flops if predicted == 1.0 else round(flops * predicted)


def flops_per_token(
    model: ModelConfig,
    seq_len: int,
    lora: LoraConfig | None = None,
    predicted: float = 1.0,
    target_len: int | None = None,
) -> int:
    """FLOPs of forward and backward for one token: 6 a matrix parameter, and attention's 12 x layers x width x seq_len;
    with ``lora`` 4 a matrix parameter and 6 one of the adapters. ``predicted``: the share of the tokens that the head
    sees.

    The accounting of "PaLM" (arXiv:2204.02311, appendix B): no credit for causality, none for recomputation. A window
    that is shorter than ``seq_len`` stands in its place. Of an encoder-decoder model: the FLOPs of ``seq_len`` tokens
    of source and ``target_len`` (None: as many) of target, for each token of source.
    """
    if model.description.encoder is not None:
        return _flops_of_pair(model, seq_len, target_len or seq_len) // seq_len
    num_keys = min(seq_len, model.attention_window or seq_len)
    attention = 12 * model.num_hidden_layers * model.sizes["queries"] * num_keys
    adapters = 0 if lora is None else num_trained_parameters(model, lora)
    in_layers = flops_of_weight(lora) * (matrix_parameters(model) - head_parameters(model))
    return in_layers + flops_of_head(model, lora, predicted) + 6 * adapters + attention


def _flops_of_pair(model: ModelConfig, source_len: int, target_len: int) -> int:
    """By the same accounting."""
    layers = flops_of_pair_layers(model, source_len, target_len)
    counts = [model.num_layers(stack) for stack in model.description.stacks]
    head = flops_of_head(model, None, 1.0) * target_len
    return sum(count * flops for count, flops in zip(counts, layers, strict=True)) + head


def flops_of_pair_layers(model: ModelConfig, source_len: int, target_len: int) -> tuple[int, int]:
    """Of a sample: those of one layer of the encoder, and of one of the decoder. Of cross-attention, keys and values
    are made of the source, queries of the target."""
    encoder, decoder = model.description.stacks
    cross = decoder.block.cross_attention
    assert cross is not None
    of_source = sum(weight.numel(model.sizes) for linear in cross.inputs[1:] for weight in linear.weights[:1])
    of_target = _matrices(model, decoder) - of_source
    scores = 12 * model.sizes["queries"]
    return (
        6 * _matrices(model, encoder) * source_len + scores * source_len**2,
        6 * (of_source * source_len + of_target * target_len) + scores * target_len * (target_len + source_len),
    )
