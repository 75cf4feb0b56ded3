"""The vocabulary in which a family is described: widths, weights, the modules of a block, Hugging Face's names.

A description is data: no torch, no config. What follows from it is computed by code that knows no family: parameters,
FLOPs, memory, the tensor-parallel table, the modules, Hugging Face folders, the checks of the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

LARGEST_SIZE = 2**24  # far beyond any model; keeps arithmetic on sizes, and the search for legal ones, small

Width = Literal[
    "hidden",
    "queries",
    "keys",
    "ffn",
    "head",
    "positions",
    "segments",
    "vocab",
    "source_vocab",
    "labels",
    "rank",
    "heads",
    "buckets",
    "one",
    "places",
    "channels",
    "patch",
]
"""A size of the model: of the residual stream, of all query heads, of all key heads (the value heads are as wide), of
the MLP's inside, of one head, of the positions, of the segments, of the vocabulary that the head writes (of a
classifier of images: its labels), of the one that an encoder reads, where it is another, and of a classifier's labels;
how many query heads there are, and how many ranges of distances have a relative bias of their own; 1; of an image's
places (its patches and the class token), of its channels, and of a side of a patch. `ModelConfig.sizes` has the
numbers; of "rank", between the two factors of a LoRA adapter, the config's `lora.rank`."""

ADAPTER_FACTORS = ("lora_A", "lora_B")
"""What an adapter's factors are called in the module of the matrix that it adapts: peft's names."""

ObjectiveName = Literal[
    "next_token",
    "masked_lm",
    "span_corruption",
    "sequence_to_sequence",
    "sequence_classification",
    "image_classification",
]
"""What a model can be trained for: a file of megatrain/objectives."""


class Misfit(NamedTuple):
    """A key of the model whose value does not fit the others': why, and the nearest one that does, as in YAML."""

    key: str
    reason: str
    nearest: str


WeightKind = Literal["norms", "biases", "positions", "embeddings", "matrices"]
"""What a weight is for: it decides whether it decays (`optimizer.no_weight_decay`)."""

HEAD_WIDTHS: Mapping[Width, Literal["query", "key_value"]] = {
    "queries": "query",
    "keys": "key_value",
    "heads": "query",
}
SHARDED_WIDTHS: frozenset[Width] = frozenset({*HEAD_WIDTHS, "ffn", "vocab", "source_vocab", "labels"})
"""What tensor-parallel ranks share out; every rank has the other widths whole."""


class Weight(NamedTuple):
    """A parameter. ``dims``: for each of its dimensions, the widths that lie side by side along it."""

    name: str
    dims: tuple[tuple[Width, ...], ...]
    kind: WeightKind = "matrices"

    def shape(self, sizes: Mapping[Width, int]) -> tuple[int, ...]:
        return tuple(sum(sizes[width] for width in dim) for dim in self.dims)

    def numel(self, sizes: Mapping[Width, int]) -> int:
        return prod(self.shape(sizes))

    @property
    def is_matrix(self) -> bool:
        return len(self.dims) > 1

    @property
    def sharded_width(self) -> Width | None:
        """The width that tensor-parallel ranks share out, if any."""
        return next((width for dim in self.dims for width in dim if width in SHARDED_WIDTHS), None)


@dataclass(frozen=True)
class Split:
    """How tensor parallelism cuts one module's parameters.

    ``kind``: "column" cuts the outputs, "row" the inputs (its bias stays whole), "vocab" the token ids, "heads" what
    each head has of its own; "shared" cuts nothing, but each rank applies the whole to heads or columns of its own, so
    that it sees a part of the gradient; "factor" cuts an adapter's factor as the matrix is cut whose module it stands
    in, which communicates for both.
    ``weight_dim``: the dimension of the weight that is cut (a gpt2 Conv1D is [in, out], a Linear [out, in]).
    ``num_parts``: tensors that lie side by side along it, each of which is cut (three in a fused query-key-value).
    ``by_heads``: "query" or "key_value" where the cut must fall between heads.
    """

    kind: Literal["column", "row", "vocab", "heads", "shared", "factor"]
    weight_dim: int
    num_parts: int = 1
    by_heads: Literal["query", "key_value"] | None = None


@dataclass(frozen=True)
class Embedding:
    """A vector for each token id ("vocab"), position or segment; the vectors of several embeddings are added up.

    ``is_scaled``: they are multiplied by the square root of their width.
    """

    name: str
    rows: Literal["vocab", "source_vocab", "positions", "segments"]
    is_scaled: bool = False

    @property
    def weights(self) -> tuple[Weight, ...]:
        kind: WeightKind = "positions" if self.rows == "positions" else "embeddings"
        return (Weight(f"{self.name}.weight", ((self.rows,), ("hidden",)), kind),)

    @property
    def split(self) -> Split | None:
        return Split("vocab", weight_dim=0) if self.rows in ("vocab", "source_vocab") else None


@dataclass(frozen=True)
class SinusoidalPositions:
    """Sines and cosines of each position, added to the tokens' vectors (Vaswani et al. 2017, "Attention Is All You
    Need", section 3.5). They have no weights."""

    name: str
    rows: Literal["sinusoids"] = "sinusoids"
    weights: tuple[Weight, ...] = ()
    split: None = None


@dataclass(frozen=True)
class RelativeBias:
    """Added to the scores of self-attention in all layers of a stack: a trained number for each head and each range of
    distances between query and key (Raffel et al. 2020, section 2.1). ``distance_key``: the model's key that has where
    the last range begins."""

    name: str
    distance_key: str = "relative_attention_max_distance"

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (Weight(f"{self.name}.weight", (("buckets",), ("heads",)), "positions"),)

    @property
    def split(self) -> Split:
        return Split("heads", weight_dim=1, by_heads="query")


@dataclass(frozen=True)
class PatchEmbedding:
    """A vector for each patch of an image, by a convolution, behind that of the class token; with one for each place
    added (Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words")."""

    name: str
    class_token: str = "cls_token"
    positions: str = "position_embeddings"
    projection: str = "patch_embeddings.projection"
    rows: Literal["places"] = "places"
    split: None = None
    """Every rank has it whole."""

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (
            Weight(f"{self.name}.{self.class_token}", (("one",), ("one",), ("hidden",)), "positions"),
            self.places,
            self.product,
            Weight(f"{self.name}.{self.projection}.bias", (("hidden",),), "biases"),
        )

    @property
    def places(self) -> Weight:
        """What is added at each place."""
        return Weight(f"{self.name}.{self.positions}", (("one",), ("places",), ("hidden",)), "positions")

    @property
    def product(self) -> Weight:
        """The matrix that each patch is multiplied with."""
        dims: tuple[tuple[Width, ...], ...] = (("hidden",), ("channels",), ("patch",), ("patch",))
        return Weight(f"{self.name}.{self.projection}.weight", dims)


@dataclass(frozen=True)
class Linear:
    """A matrix product. ``outputs``: more than one are equally wide products in one, such as a fused query-key-value.

    ``is_conv1d``: the weight is [in, out], as OpenAI stored it and Hugging Face keeps it.
    """

    name: str
    inputs: Width
    outputs: tuple[Width, ...]
    bias: bool = False
    is_conv1d: bool = False

    @property
    def weights(self) -> tuple[Weight, ...]:
        dims = ((self.inputs,), self.outputs) if self.is_conv1d else (self.outputs, (self.inputs,))
        bias = (Weight(f"{self.name}.bias", (self.outputs,), "biases"),) if self.bias else ()
        return (Weight(f"{self.name}.weight", dims), *bias)

    @property
    def adapter(self) -> tuple[Linear, Linear]:
        """LoRA's factors A and B (Hu et al. 2021, arXiv:2106.09685), in the module itself, under peft's names."""
        a, b = ADAPTER_FACTORS
        return Linear(a, self.inputs, ("rank",)), Linear(b, "rank", self.outputs)

    @property
    def split(self) -> Split:
        out_dim = 1 if self.is_conv1d else 0
        is_factor = "rank" in (self.inputs, *self.outputs)
        if self.inputs in SHARDED_WIDTHS:
            return Split("factor" if is_factor else "row", 1 - out_dim, by_heads=HEAD_WIDTHS.get(self.inputs))
        if self.outputs[0] in ("vocab", "labels"):
            return Split("vocab", out_dim)
        if self.outputs[0] in SHARDED_WIDTHS:
            kind: Literal["factor", "column"] = "factor" if is_factor else "column"
            return Split(kind, out_dim, len(self.outputs), HEAD_WIDTHS.get(self.outputs[0]))
        return Split("shared", out_dim)


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm with a bias, of each token ("hidden") or of each of its heads ("head")."""

    name: str
    kind: Literal["rms", "layer"]
    width: Literal["hidden", "head"] = "hidden"

    @property
    def weights(self) -> tuple[Weight, ...]:
        names = ("weight",) if self.kind == "rms" else ("weight", "bias")
        return tuple(Weight(f"{self.name}.{name}", ((self.width,),), "norms") for name in names)

    @property
    def split(self) -> Split | None:
        return Split("shared", weight_dim=0) if self.width == "head" else None

    @property
    def eps_key(self) -> str:
        """The model's key that has what is added to the variance."""
        return "rms_norm_eps" if self.kind == "rms" else "layer_norm_epsilon"

    @property
    def saved_bytes(self) -> int:
        """fp32 statistics of a normalized vector that the backward pass needs: its scale, in LayerNorm its mean too."""
        return 4 if self.kind == "rms" else 8


@dataclass(frozen=True)
class Attention:
    """Self-attention, or where the layer attends to an encoder's output too, that.

    ``is_causal``: a token sees those before it and itself, else all; next-token prediction needs it.

    ``inputs``: queries, keys and values, each by a product of its own or all by one. ``head_norms``: of the queries and
    of the keys. ``rotates``: positions enter by rotation of queries and keys. ``window_key``: the model's key that has
    how many tokens a token attends to, itself among them; None: it attends to all before it. ``is_scaled``: scores are
    divided by the square root of the head's width. ``relative_bias``: what all layers add to them.
    """

    name: str
    inputs: tuple[Linear, ...]
    output: Linear
    head_norms: tuple[Norm, ...] = ()
    rotates: bool = False
    window_key: str | None = None
    is_causal: bool = True
    is_scaled: bool = True
    relative_bias: RelativeBias | None = None

    @property
    def modules(self) -> tuple[Linear | Norm, ...]:
        return (*self.inputs, self.output, *self.head_norms)

    @property
    def is_fused(self) -> bool:
        """Whether one product makes queries, keys and values."""
        return len(self.inputs) == 1


@dataclass(frozen=True)
class Mlp:
    """output(activation(inputs[0](x))), or gated output(activation(inputs[0](x)) * inputs[1](x)) (Shazeer 2020).

    ``name``: empty where its matrices have no module of their own in the layer.
    """

    name: str
    inputs: tuple[Linear, ...]
    output: Linear
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]

    @property
    def modules(self) -> tuple[Linear, ...]:
        return (*self.inputs, self.output)

    @property
    def is_gated(self) -> bool:
        return len(self.inputs) == 2

    def usual_width(self, hidden_size: int) -> int:
        """The width where the config has none: 4 x hidden_size; gated 8/3 x hidden_size, a multiple of 256."""
        return -(-8 * hidden_size // (3 * 256)) * 256 if self.is_gated else 4 * hidden_size


Module: TypeAlias = Attention | Mlp | Norm


@dataclass(frozen=True)
class Block:
    """A layer: x + attention(norm(x)), then x + mlp(norm(x)). ``prefix``: what stands before its number.

    ``is_post_norm``: norm(x + attention(x)), then norm(x + mlp(x)). ``norms_last``: in the order of the parameters the
    norms come behind both. ``cross_attention``: to an encoder's output, between the two, with its norm.
    """

    prefix: str
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    norms_last: bool = False
    is_post_norm: bool = False
    cross_attention_norm: Norm | None = None
    cross_attention: Attention | None = None

    @property
    def branches(self) -> Mapping[str, tuple[Norm, Attention | Mlp]]:
        """What is added to the residual stream, in order, by its role: a norm and what follows it."""
        found: dict[str, tuple[Norm, Attention | Mlp]] = {"attention": (self.attention_norm, self.attention)}
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            found["cross_attention"] = (self.cross_attention_norm, self.cross_attention)
        return {**found, "mlp": (self.mlp_norm, self.mlp)}

    @property
    def modules(self) -> tuple[Module, ...]:
        """In the order of their parameters."""
        if self.norms_last:
            norms, parts = zip(*self.branches.values(), strict=True)
            return (*parts, *norms)
        return tuple(chain(*(pair[::-1] if self.is_post_norm else pair for pair in self.branches.values())))

    @cached_property
    def leaves(self) -> Mapping[str, Linear | Norm]:
        """Every module that has weights, by its name in the layer."""
        return dict(self._leaves())

    def _leaves(self) -> Iterator[tuple[str, Linear | Norm]]:
        for module in self.modules:
            if isinstance(module, Norm):
                yield module.name, module
            else:
                yield from ((_path(module, inner), inner) for inner in module.modules)

    @cached_property
    def factors(self) -> Mapping[str, Linear]:
        """The factors that an adapter of each of its matrices has, by their names in the layer."""
        linear = {path: leaf for path, leaf in self.leaves.items() if isinstance(leaf, Linear)}
        return {f"{path}.{factor.name}": factor for path, leaf in linear.items() for factor in leaf.adapter}

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Under their names in the layer."""
        return tuple(_named_weights(self.leaves))

    def adapted(self, adapts: Callable[[str], bool]) -> list[str]:
        """The matrices that have an adapter, by their names in the layer."""
        return [path for path, leaf in self.leaves.items() if isinstance(leaf, Linear) and adapts(path)]

    def adapter_weights(self, adapts: Callable[[str], bool]) -> tuple[Weight, ...]:
        """Those of LoRA's adapters, named alike. ``adapts``: whether the matrix of a module's name has one."""
        chosen = {path: factor for path, factor in self.factors.items() if adapts(path.rpartition(".")[0])}
        return tuple(_named_weights(chosen))

    @property
    def residual_projections(self) -> tuple[str, ...]:
        """The modules that write to the residual stream."""
        return tuple(_path(part, part.output) for _, part in self.branches.values())


def is_adapter(parameter: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return parameter.rpartition(".")[0].rpartition(".")[2] in ADAPTER_FACTORS


def not_one_label(theirs: Mapping[str, Any], what: str) -> str | None:
    """Why ``what`` has not one label of several in a config.json of a classifier; None: it has."""
    kind = theirs.get("problem_type") or "single_label_classification"
    if kind == "single_label_classification" and len(theirs.get("id2label") or "ab") > 1:
        return None
    return f"{what} has one label of several here: problem_type must be 'single_label_classification'."


def _path(module: Attention | Mlp, inner: Linear | Norm) -> str:
    """The name in the layer of a part of ``module``."""
    return f"{module.name}.{inner.name}".removeprefix(".")


FirstLayer: TypeAlias = Embedding | PatchEmbedding | SinusoidalPositions
_Layer = TypeVar("_Layer")


def _present(layer: _Layer | None) -> tuple[_Layer, ...]:
    return () if layer is None else (layer,)


def _named_weights(modules: Mapping[str, Linear | Norm]) -> Iterator[Weight]:
    for path, module in modules.items():
        parent = path.removesuffix(module.name)
        yield from (weight._replace(name=parent + weight.name) for weight in module.weights)


@dataclass(frozen=True)
class HeadTransform:
    """What stands before the head: norm(activation(linear(x))), of what a target is asked at.

    ``drops``: of what it gives, the share ``hidden_dropout`` is dropped.
    """

    name: str
    linear: Linear
    activation: Literal["gelu", "tanh"]
    norm: Norm | None = None
    drops: bool = False

    @property
    def weights(self) -> tuple[Weight, ...]:
        inner = (*self.linear.weights, *(self.norm.weights if self.norm else ()))
        return tuple(weight._replace(name=f"{self.name}.{weight.name}") for weight in inner)


@dataclass(frozen=True)
class Stack:
    """Layers that activations pass through one after the other: the embeddings and their norm, as many blocks as the
    model's key ``layers_key`` says (null: num_hidden_layers), the norm."""

    embeddings: tuple[FirstLayer, ...]
    block: Block
    norm: Norm | None
    layers_key: str = "num_hidden_layers"
    embedding_norm: Norm | None = None

    @property
    def first_layers(self) -> tuple[FirstLayer | Norm, ...]:
        """The layers before the blocks, in order."""
        return (*self.embeddings, *_present(self.embedding_norm))

    @property
    def outer_layers(self) -> tuple[FirstLayer | RelativeBias | Norm, ...]:
        """Those beside the blocks, in order."""
        return (*self.first_layers, *_present(self.block.attention.relative_bias), *_present(self.norm))


@dataclass(frozen=True)
class HuggingFace:
    """The family in transformers. Keys of its config.json are "theirs", the model's keys in our config "ours".

    ``architecture``: its class. ``names``: ours to theirs. ``required``: what of theirs must have one value for the
    layers to be ours; so it is written, too. ``absent``: what transformers takes for a key of theirs that is left out;
    sizes that are not here must be given. ``aliases``: names of ours that its config.json may have too, and that come
    before theirs. ``parameters``: those of ours that have another name there, and what that is. ``one_row``: so too,
    of vectors that are matrices of one row there. ``unread``: patterns of names of tensors that its folders may have
    and the model does not. ``labels_key``: the model's key that has how many labels a classifier has, whose names
    config.json has under ``id2label``. ``copies``: further keys of theirs that have the value of one of ours.
    ``constants``: what else is written. ``refuse``: of a config.json with ``absent`` filled in, why its layers are not
    ours, or None. ``warnings``: of one that is written, what transformers makes of it otherwise, each in a sentence.
    ``modules``: parts of names of tensors in files, which are ours, and what transformers calls the modules; in order.
    """

    architecture: str
    names: Mapping[str, str]
    required: Mapping[str, Any]
    absent: Mapping[str, Any]
    aliases: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    one_row: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    labels_key: str | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda theirs: None
    warnings: Callable[[Mapping[str, Any]], list[str]] = lambda theirs: []
    modules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """All that is known of a family: its layers in order (``embeddings`` and ``embedding_norm``, ``block`` as often as
    the config says, ``norm``, ``head_transform`` and ``head``), and how others write it.

    ``asks_at_places``: of a sample only some tokens are asked, which the batch names, not each. ``summary``: what is
    particular to it. ``own_keys``: keys of the model that only such families have, as pydantic's ``create_model`` takes
    them: type and Field. ``objectives``: what it can be trained for; the first where the config does not say.
    ``encoder``: what reads the source, where the decoder attends to one. ``classifier``: the same with a head that
    classifies, which a model has where ``num_labels`` is given. ``initial_deviation``: of the initial values
    of the matrix of a module's name, for the model's sizes; None: as initializer_range and init_scheme say.
    ``variant``: the description for a model, where its own keys choose among several. ``misfit``: what of a model's own
    keys does not fit together, if anything. ``defaults``: keys of the model that have another default in this family.
    ``implied``: the defaults of those that follow from others, and have one name in transformers and here.
    ``never_writes_start``: the decoder's first input, padding, is never its output.
    """

    summary: str
    embeddings: tuple[FirstLayer, ...]
    block: Block
    norm: Norm | None
    head: Linear
    hugging_face: HuggingFace
    embedding_norm: Norm | None = None
    head_transform: HeadTransform | None = None
    asks_at_places: bool = False
    own_keys: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    objectives: tuple[ObjectiveName, ...] = ("next_token",)
    encoder: Stack | None = None
    classifier: Family | None = None
    initial_deviation: Callable[[str, Mapping[Width, int]], float] | None = None
    variant: Callable[[Any], Family] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda keys: {}
    misfit: Callable[[Any], Misfit | None] = lambda model: None
    never_writes_start: bool = False

    def of(self, model: Any) -> Family:
        """The description for a model of these keys."""
        if self.classifier is not None and model.num_labels is not None:
            return self.classifier
        return self if self.variant is None else self.variant(model)

    @property
    def decoder(self) -> Stack:
        key = "num_hidden_layers" if self.encoder is None else "num_decoder_layers"
        return Stack(self.embeddings, self.block, self.norm, key, self.embedding_norm)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The encoder, where there is one, and the decoder."""
        return (self.decoder,) if self.encoder is None else (self.encoder, self.decoder)

    @property
    def reads_another_vocabulary(self) -> bool:
        """Whether the encoder has an embedding of its own, of another vocabulary than the one that is written."""
        return any(layer.rows == "source_vocab" for stack in self.stacks for layer in stack.embeddings)

    @property
    def can_generate(self) -> bool:
        """Whether it writes texts: it does not see what comes after a token."""
        return self.block.attention.is_causal

    @property
    def reads_images(self) -> bool:
        return any(embedding.rows == "places" for embedding in self.embeddings)

    @property
    def classifies(self) -> bool:
        """Whether its head chooses among labels, not tokens."""
        return self.hugging_face.labels_key is not None

    @property
    def can_tie_head(self) -> bool:
        """Whether the head's matrix may be that of the token embedding: both have a row for each token id."""
        return self.head.outputs == (self.embeddings[0].rows,)

    @property
    def head_weights(self) -> tuple[str, ...]:
        """Names of what stands behind the last norm: a new head begins with other values of them."""
        transform = self.head_transform.weights if self.head_transform else ()
        return tuple(weight.name for weight in (*transform, *self.head.weights))

    @property
    def learns_positions(self) -> bool:
        return any(embedding.rows == "positions" for embedding in self.embeddings)

    @property
    def some_keys(self) -> set[str]:
        """Those of the model's keys that this family reads and others may not."""
        norms = (leaf for leaf in (*self.block.leaves.values(), *self.outer_layers) if isinstance(leaf, Norm))
        rotary = ("rope_theta", "rope_scaling") if self.block.attention.rotates else ()
        drawn = ("initializer_range", "init_scheme") if self.initial_deviation is None else ()
        return {*(norm.eps_key for norm in norms), *rotary, *drawn, *self.own_keys}

    @property
    def first_layers(self) -> tuple[FirstLayer | Norm, ...]:
        """The layers before the blocks, in order."""
        return self.decoder.first_layers

    @property
    def last_layers(self) -> tuple[Norm | HeadTransform | Linear, ...]:
        """The layers behind the blocks, in order; the head is the last."""
        return (*_present(self.norm), *_present(self.head_transform), self.head)

    @property
    def outer_layers(self) -> tuple[FirstLayer | RelativeBias | Norm | HeadTransform | Linear, ...]:
        """The layers beside the blocks, in order, each once."""
        layers = (layer for stack in self.stacks for layer in stack.outer_layers)
        return (*dict.fromkeys(layers), *_present(self.head_transform), self.head)

    def kind_of(self, parameter: str) -> WeightKind:
        """Of a parameter by its canonical name, which of a tied head is the embedding's."""
        if is_adapter(parameter):
            return "matrices"
        found = self.in_block(parameter)
        outer = self._kinds.get(parameter)
        return outer or self._kinds[found[1] if found else parameter]

    @cached_property
    def _kinds(self) -> Mapping[str, WeightKind]:
        """By name; those of a block by their names in the layer."""
        outer = (weight for layer in self.outer_layers for weight in layer.weights)
        in_layers = (weight for stack in self.stacks for weight in stack.block.weights)
        return {weight.name: weight.kind for weight in (*in_layers, *outer)}

    def adapted(self, adapts: Callable[[str], bool]) -> list[str]:
        """The matrices of all stacks that have an adapter, by their names in the layer."""
        return list(dict.fromkeys(path for stack in self.stacks for path in stack.block.adapted(adapts)))

    def in_block(self, name: str) -> tuple[Block, str] | None:
        """Of what a layer has, the block and the name in its layer."""
        for block in (stack.block for stack in self.stacks):
            before, _, inside = name.partition(f"{block.prefix}.")
            if not before:
                return block, inside.partition(".")[2]
        return None

    def split_of(self, module_name: str) -> Split | None:
        """How the module of this canonical name is cut; None: not at all."""
        found: FirstLayer | RelativeBias | Norm | Linear | None
        outer = (*(layer for stack in self.stacks for layer in stack.outer_layers), self.head)
        found = next((layer for layer in outer if layer.name == module_name), None)
        if found is None and (place := self.in_block(module_name)) is not None:
            block, name = place
            found = block.leaves.get(name) or block.factors.get(name)
        return found.split if found else None
