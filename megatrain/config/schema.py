"""The config as records: every key, its type, its default, its limits and its meaning.

The records are frozen and strict: `true` is no 1, `1.0` is no integer, an unknown key is an error. What spans several
keys of one section is checked by that section, what spans sections by RunConfig; the rules are in checks.py. Rules
that need the number of ranks are in megatrain.plan.rules. docs/config.md is generated from the descriptions here.
"""

from __future__ import annotations

import os.path
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megatrain.config import checks
from megatrain.config.arithmetic import LARGEST_COUNT
from megatrain.config.batch_size import sizes_of
from megatrain.config.corruption import corrupted_lengths
from megatrain.config.problem import Problem
from megatrain.families import FAMILIES
from megatrain.families.description import LARGEST_SIZE, Family, ObjectiveName, Stack, WeightKind, Width

if TYPE_CHECKING:
    FamilyName = str
else:  # the names are those of files
    FamilyName = Literal[tuple(FAMILIES)]

FROM_CHECKPOINT = "from_checkpoint"  # in place of the model's keys: see ModelConfig
ALL_LINEAR = "all-linear"  # in place of the names of matrices: see LoraConfig


def in_home(path: str) -> str:
    """A path that begins with ``~/``, in the home folder; any other as it is."""
    return os.path.expanduser(path) if path.startswith("~/") else path  # noqa: PTH111 (addresses are no paths)


Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
SIZE_TAG, RAMP_TAG = "one size", "a ramp"
RampEntry = Annotated[tuple[Annotated[int, Field(ge=0, le=LARGEST_COUNT)], Size], Field(strict=False)]
Ramp = Annotated[tuple[RampEntry, ...], Field(strict=False, min_length=1)]
SizeOrRamp = Annotated[
    Annotated[Size, Tag(SIZE_TAG)] | Annotated[Ramp, Tag(RAMP_TAG)],
    Discriminator(lambda given: RAMP_TAG if isinstance(given, list | tuple) else SIZE_TAG),
]
Path = Annotated[str, Field(min_length=1), AfterValidator(in_home)]
Text = Annotated[str, Field(min_length=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the config: frozen, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    _check: ClassVar[Callable[[Any], list[Problem]]] = staticmethod(lambda section: [])

    def __init_subclass__(cls, check: Callable[[Any], list[Problem]] | None = None, **settings: Any) -> None:
        """``check``: gives what is wrong with a section whose keys are right one by one."""
        super().__init_subclass__(**settings)
        if check is not None:
            cls._check = staticmethod(check)

    @model_validator(mode="after")
    def _consistent(self) -> Section:
        """Hands the problems to pydantic with their own keys, so that `load` can list them beside all others."""
        if problems := type(self)._check(self):
            text = "\n".join(problem.text() for problem in problems)
            raise PydanticCustomError("inconsistent", "{text}", {"text": text, "problems": problems})
        return self


class RunSection(Section):
    """Where a run lives and what it starts from."""

    dir: Path = Field(description="The run folder: checkpoints, metrics and logs. An existing run in it is resumed.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=1234, description="Seed of the initial weights, the data order and dropout."
    )
    init_from: Path | None = Field(
        default=None,
        description="A checkpoint, a run folder or a Hugging Face folder to take the weights from, which must be of "
        "this model and tokenizer; null: initialise them from the seed.",
    )
    init_from_ema: bool = Field(
        default=False, description="Take the averaged weights of init_from, where it has them (optimizer.ema_decay)."
    )
    resize_token_embeddings: bool = Field(
        default=False,
        description="Add rows to the embedding and the head of init_from for the tokens that the data's tokenizer has "
        "beyond that of init_from; all others must be the same. The rows there are stay as they are.",
    )
    new_head: bool = Field(
        default=False,
        description="Begin with a head of this model's own, drawn by seed, in place of that of init_from: for other "
        "labels, or to classify with what was pretrained. All other weights come from init_from.",
    )


class RopeScaling(Section, check=checks.rope_scaling):
    """How rotary frequencies are stretched for longer contexts, under Hugging Face's names."""

    rope_type: Literal["linear", "llama3"] = Field(
        description="linear: positions divided by factor; llama3: low frequencies stretched by factor, as in Llama 3.1."
    )
    factor: Annotated[float, Field(ge=1.0)] = Field(description="By how much the context is stretched.")
    low_freq_factor: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="llama3: wavelengths over original_max_position_embeddings / low_freq_factor are fully stretched.",
    )
    high_freq_factor: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="llama3: wavelengths under original_max_position_embeddings / high_freq_factor stay as they are.",
    )
    original_max_position_embeddings: Size | None = Field(
        default=None, description="llama3: the context, in tokens, before it was stretched."
    )


class SharedModelKeys(Section, check=checks.model):
    """The decoder's shape, under Hugging Face's names, which are the same here for every family.

    `model: from_checkpoint` in place of the keys takes all of them from the run's own newest checkpoint, or, where it
    has none yet, from the one in `run.init_from`; `model.KEY=VALUE` on the command line is put over that.
    """

    family: FamilyName = Field(
        default="llama",
        description="Which model: " + "; ".join(f"{name}: {each.summary}" for name, each in FAMILIES.items()) + ".",
    )
    hidden_size: Size = Field(description="Width of the residual stream.")
    intermediate_size: Size | None = Field(
        default=None,
        description="Width inside the MLP; null: 4 x hidden_size, in a gated MLP 8/3 x hidden_size, rounded up to a "
        "multiple of 256.",
    )
    num_hidden_layers: Size = Field(description="Layers; of a family with an encoder, those of the encoder.")
    num_attention_heads: Size = Field(description="Query heads of a layer.")
    num_key_value_heads: Size | None = Field(
        default=None, description="Key and value heads of a layer (grouped-query attention); null: num_attention_heads."
    )
    head_dim: Size | None = Field(default=None, description="Width of a head; null: hidden_size / num_attention_heads.")
    max_position_embeddings: Size = Field(
        default=256, description="The longest context in tokens; data.seq_len may not exceed it."
    )
    vocab_size: Size | None = Field(
        default=None,
        description="Token ids the model knows, unpadded; null: the dataset's tokenizer decides. Of a classifier: its "
        "labels; null: the dataset's.",
    )
    rms_norm_eps: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0e-5, description="Families with RMSNorm: added to the mean square."
    )
    layer_norm_epsilon: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0e-5, description="Families with LayerNorm: added to the variance."
    )
    rope_theta: Annotated[float, Field(gt=0.0)] = Field(
        default=10000.0, description="Families with rotary positions: base of the frequencies."
    )
    rope_scaling: RopeScaling | None = Field(
        default=None, description="Families with rotary positions: frequencies for longer contexts."
    )
    tie_word_embeddings: bool = Field(
        default=True,
        description="The output head shares the token embedding's weight, but for a classifier's. Left out, it is "
        "false in family t5, as in T5 v1.1.",
    )
    attention: Literal["auto", "flash3", "cudnn", "flash", "math"] = Field(
        default="auto",
        description="The kernel of attention; auto: the first of flash3, cudnn and flash that the devices have, and "
        "that computes there what math does; where they have none, PyTorch's choice. A kernel that is named and not "
        "there is refused. Checkpoints and exports do not depend on it.",
    )
    attention_dropout: Probability = Field(
        default=0.0, description="Share of attention probabilities dropped in training."
    )
    hidden_dropout: Probability = Field(
        default=0.0, description="Share of the embedding's and of each residual branch's output dropped in training."
    )
    initializer_range: Annotated[float, Field(gt=0.0)] = Field(
        default=0.02, description="Standard deviation of the initial weights."
    )
    init_scheme: Literal["gpt2", "normal", "depth"] = Field(
        default="gpt2",
        description="Scale of the projections that write to the residual stream: gpt2: 1/sqrt(2 x layers); "
        "normal: 1; depth: 1/sqrt(2 x (layer + 1)). transformers draws family gpt2 as gpt2, the others as normal.",
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_left_out_are_the_familys(cls, given: Any) -> Any:
        return checks.with_defaults_of_family(given)

    @property
    def ffn_size(self) -> int:
        """Width inside the MLP, derived from the family where intermediate_size is null."""
        return self.intermediate_size or self.description.block.mlp.usual_width(self.hidden_size)

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a layer."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def attention_window(self) -> int | None:
        """How many tokens a token attends to, itself among them; None: all before it."""
        key = self.description.block.attention.window_key
        window = getattr(self, key) if key else None
        return window if window is not None and window < self.max_position_embeddings else None

    @property
    def num_places(self) -> int | None:
        """Tokens of an image: its patches, and the class token before them; None where the model reads text."""
        if not self.description.reads_images:
            return None
        size, patch = (int(getattr(self, key)) for key in ("image_size", "patch_size"))
        return (size // patch) ** 2 + 1

    @property
    def longest_sequence(self) -> int:
        """Tokens that the model reads at once at the most."""
        return self.num_places or self.max_position_embeddings

    @property
    def known_vocab_size(self) -> int:
        """The size of the vocabulary that the model writes, which by now must be known."""
        if self.target_vocab_size is None:
            raise ValueError("model.vocab_size must be known before a model is counted or built")
        return self.target_vocab_size

    @property
    def target_vocab_size(self) -> int | None:
        """Of the vocabulary that the model writes; it may read another one."""
        separate: int | None = getattr(self, "decoder_vocab_size", None)
        return self.vocab_size if separate is None else separate

    @property
    def num_answers(self) -> int:
        """What the head chooses among: token ids, or labels."""
        return self.sizes[self.description.head.outputs[0]]

    @property
    def description(self) -> Family:
        """The family's, with the head that the model has."""
        return FAMILIES[self.family].of(self)

    @property
    def is_tied(self) -> bool:
        """Whether head and token embedding are one weight; those of a classifier cannot be."""
        return self.tie_word_embeddings and self.description.can_tie_head

    @property
    def sizes(self) -> Mapping[Width, int]:
        """The widths that the family's description speaks of, in elements; a vocabulary that is not known has none."""
        return {
            "hidden": self.hidden_size,
            "queries": self.num_attention_heads * self.head_size,
            "keys": self.kv_heads * self.head_size,
            "ffn": self.ffn_size,
            "head": self.head_size,
            "positions": self.max_position_embeddings,
            "segments": getattr(self, "type_vocab_size", 0),
            "one": 1,
            "places": self.num_places or 0,
            "channels": getattr(self, "num_channels", 0),
            "patch": getattr(self, "patch_size", 0),
            "vocab": self.target_vocab_size or 0,
            "source_vocab": self.vocab_size or 0,
            "labels": getattr(self, "num_labels", None) or 0,
            "heads": self.num_attention_heads,
            "buckets": getattr(self, "relative_attention_num_buckets", 0),
        }

    def num_layers(self, stack: Stack) -> int:
        """Layers of one of the family's stacks."""
        return getattr(self, stack.layers_key) or self.num_hidden_layers


if TYPE_CHECKING:
    ModelConfig = SharedModelKeys
else:  # with the keys that families have of their own
    ModelConfig = create_model(
        "ModelConfig",
        __base__=SharedModelKeys,
        __doc__=SharedModelKeys.__doc__,
        __module__=__name__,
        **{key: declared for each in FAMILIES.values() for key, declared in each.own_keys.items()},
    )


class FillInTheMiddle(Section, check=checks.fill_in_the_middle):
    """The middle of a document moved to its end (Bavarian et al. 2022), so that a model learns to fill gaps."""

    rate: Share = Field(default=0.5, description="Share of the documents.")
    spm_rate: Share = Field(
        default=0.5, description="Of these, the share in the order suffix, prefix, middle; the others: prefix first."
    )
    prefix_token: Text = Field(default="<|fim_prefix|>", description="A control token of the tokenizer.")
    middle_token: Text = Field(default="<|fim_middle|>", description="A control token of the tokenizer.")
    suffix_token: Text = Field(default="<|fim_suffix|>", description="A control token of the tokenizer.")


class Spans(Section, check=checks.spans):
    """Spans of a text that are moved behind sentinels, as in T5."""

    corrupted: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.15, description="Share of such a text's tokens that is moved."
    )
    mean_span_tokens: Annotated[float, Field(ge=1.0)] = Field(default=3.0, description="Mean length of a span.")
    sentinel_token: Text = Field(
        default="<extra_id_{}>", description="Control tokens of the tokenizer, with 0, 1, ... for the braces."
    )


class SpanCorruption(Spans, check=checks.spans):
    """Spans of a document moved to its end, as in UL2."""

    rate: Share = Field(default=0.5, description="Share of the documents.")


class TokenMasking(Section):
    """Tokens hidden from the model's inputs; what it has to predict stays as it is."""

    rate: Probability = Field(default=0.15, description="Share of the tokens.")
    mask_token: Text = Field(default="<mask>", description="A control token of the tokenizer.")


class TrainingDataset(Section, check=checks.training_dataset):
    """One dataset of the mixture, and what is done to its documents in training (never in evaluation)."""

    path: Path = Field(
        description="A dataset folder, as `megatrain-data tokenize` wrote it, or the address of a copy (s3://...)."
    )
    weight: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="Share of the samples, relative to the other weights."
    )
    fill_in_the_middle: FillInTheMiddle | None = Field(default=None, description="Fill-in-the-middle, for code.")
    span_corruption: SpanCorruption | None = Field(
        default=None, description="Span corruption; a document gets this or fill-in-the-middle, or neither."
    )
    token_masking: TokenMasking | None = Field(default=None, description="Masking of input tokens.")
    transform: Text | None = Field(
        default=None,
        description="A function of your own as module:function, which is given a document's tokens and a numpy "
        "Generator and returns as many tokens; applied before all others.",
    )


class ValidationDataset(Section):
    """One dataset to evaluate on."""

    path: Path = Field(
        description="A dataset folder, as `megatrain-data tokenize` wrote it, or the address of a copy (s3://...)."
    )


_Dataset = TypeVar("_Dataset", TrainingDataset, ValidationDataset)
_ByPath = Annotated[_Dataset, BeforeValidator(lambda given: {"path": given} if isinstance(given, str) else given)]


class DataConfig(Section, check=checks.data):
    """What is read, and how it is cut into samples."""

    train: Annotated[tuple[_ByPath[TrainingDataset], ...], Field(strict=False, min_length=1, max_length=65_536)] = (
        Field(description="The mixture to train on: up to 65,536 datasets. An entry that is text is a path.")
    )
    validation: Annotated[tuple[_ByPath[ValidationDataset], ...], Field(strict=False)] = Field(
        default=(), description="What to evaluate on; an empty list: no evaluation. An entry that is text is a path."
    )
    cache_dir: Text = Field(
        default="~/.cache/megatrain",
        description="Where parts of datasets at an address are kept, on a disk of the machine; its ranks share it.",
    )
    cache_bytes: Count = Field(
        default=64 * 2**30, description="How many bytes of them; what was not used for longest goes first."
    )
    seq_len: Size = Field(description="Tokens of a sample.")
    document_mask: bool = Field(
        default=False, description="Attention and positions start anew at each document within a sample."
    )
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="concat: the stream of documents is cut every seq_len tokens; best_fit: documents are packed into "
        "samples so that none is cut that fits into one (planned once, in RUN/packing). Validation is always concat.",
    )
    score_after_eod: bool | None = Field(
        default=None,
        description="The target after each end-of-document token counts, in training and in every evaluation; null: it "
        "does with packing: concat. best_fit has no such targets.",
    )
    num_new_epochs: Annotated[int, Field(ge=0, le=LARGEST_COUNT)] = Field(
        default=0,
        description="Raised by one, the resume that sees it gives up what is left of every dataset's epoch and begins "
        "the next: then seq_len and packing may change at will. It counts such requests, and stays as it is after.",
    )

    @property
    def scores_after_eod(self) -> bool:
        """Whether targets that begin a document count, derived from the packing where score_after_eod is null."""
        return self.packing == "concat" if self.score_after_eod is None else self.score_after_eod


class MaskedLMConfig(Section, check=checks.masked_lm):
    """Masked language modeling: which tokens are hidden and predicted, by the names of Hugging Face's data collator."""

    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.15, description="Share of a sample's tokens that are selected to be predicted."
    )
    mask_replace_prob: Share = Field(default=0.8, description="Of these, the share replaced by mask_token.")
    random_replace_prob: Share = Field(
        default=0.1, description="The share replaced by a random token; the rest stays as it is."
    )
    whole_word_mask: bool = Field(default=False, description="All tokens of a word are selected, or none.")
    mask_token: Text = Field(default="[MASK]", description="A control token of the tokenizer.")

    def most_targets(self, seq_len: int) -> int:
        """Targets of a sample of one document, which has the most; two of its tokens begin and end it."""
        return max(round((seq_len - 2) * self.mlm_probability), 1)


class RandAugmentConfig(Section):
    """RandAugment (Cubuk et al. 2019): operations chosen at random for each image, all of one strength."""

    num_ops: Annotated[int, Field(ge=1, le=16)] = Field(default=2, description="Operations on an image, one by one.")
    magnitude: Annotated[float, Field(ge=0.0, le=10.0)] = Field(
        default=5.0, description="Their strength; 0: they change nothing, 10: as far as they go."
    )


Channels = Annotated[tuple[float, ...], Field(strict=False, min_length=1, max_length=4)]


class ImageClassificationConfig(Section, check=checks.image_classification):
    """Images and their labels: how pixels become numbers, and what is done to images in training (never in
    evaluation)."""

    image_mean: Channels = Field(
        default=(0.5,), description="Subtracted from pixels in [0, 1]: one number, or one for each channel."
    )
    image_std: Channels = Field(default=(0.5,), description="What they are then divided by.")
    min_crop_scale: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0,
        description="A random part of each image, of at least this share of its area, is resized to image_size; 1: all "
        "of it.",
    )
    flip_prob: Share = Field(default=0.0, description="Share of the images that are mirrored, left to right.")
    randaugment: RandAugmentConfig | None = Field(default=None, description="RandAugment.")
    mixup_alpha: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="Each image is mixed with another one, and so is its label (Zhang et al. 2017), by a share from "
        "Beta(mixup_alpha, mixup_alpha); 0: none is.",
    )


class ObjectiveConfig(Section):
    """What the model is trained for: what it reads of a sample, and what it predicts."""

    type: ObjectiveName | None = Field(
        default=None,
        description="next_token: each token from those before it; masked_lm: hidden tokens from those on either "
        "side; span_corruption: spans that are left out of the text "
        "that an encoder reads (T5); sequence_to_sequence: the target of each pair from its source; "
        "sequence_classification: the label of a text; image_classification: the label of an image; null: what the "
        "model is trained for.",
    )
    target_len: Size | None = Field(
        default=None,
        description="sequence_to_sequence: tokens of target in a sample, whose tokens of source are data.seq_len; "
        "null: as many.",
    )
    label_smoothing: Probability = Field(
        default=0.0,
        description="So much of each target's probability is shared out evenly among all token ids (or labels) in "
        "training, as by torch's cross_entropy. The loss of a step is that of the smoothed targets; validation and "
        "`megatrain eval` do not smooth.",
    )
    span_corruption: Spans = Field(default=Spans(), description="Which tokens span_corruption moves.")
    masked_lm: MaskedLMConfig = Field(default=MaskedLMConfig(), description="How masked_lm chooses and hides tokens.")
    image_classification: ImageClassificationConfig = Field(
        default=ImageClassificationConfig(), description="How image_classification reads and augments images."
    )

    def of(self, model: ModelConfig) -> ObjectiveName:
        """The objective of a model, derived from its family where type is null."""
        return self.type or model.description.objectives[0]

    def most_targets(self, model: ModelConfig, seq_len: int) -> int:
        """Targets of a sample, scored or not."""
        kind = self.of(model)
        if kind == "image_classification":
            return 2 if self.image_classification.mixup_alpha else 1
        if kind == "sequence_classification":  # as many as the shortest texts that fill it
            return seq_len // checks.SHORTEST_ALONE
        return self.masked_lm.most_targets(seq_len) if kind == "masked_lm" else seq_len


class ParallelConfig(Section, check=checks.parallel):
    """How the model is laid out. The data degree is derived: world size / (tensor x pipeline)."""

    tensor: Size = Field(default=1, description="Ranks that share each layer's matrices.")
    pipeline: Size = Field(default=1, description="Ranks that the layers are divided over, in stages.")
    pipeline_chunks: Size = Field(
        default=1,
        description="Chunks of consecutive layers on each pipeline rank (virtual stages): 1: the 1F1B schedule; more: "
        "the interleaved one, which idles less and sends more.",
    )
    engine: Literal["deepspeed", "fsdp2"] = Field(
        default="deepspeed",
        description="What shards the model and updates it: DeepSpeed's ZeRO, or torch's FSDP2 (fully_shard).",
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        default=1,
        description="What data-parallel ranks share: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights.",
    )
    sequence: bool = Field(
        default=False, description="Norms, dropout and residuals on 1/tensor of the tokens; needs tensor > 1."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations computed again in the backward pass: selective: the attention core and the MLP's "
        "activation; full: whole layers.",
    )
    recompute_every: Size = Field(default=1, description="With recompute: full, every k-th layer is recomputed.")
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none",
        description="What lives in CPU memory: optimizer: the optimizer's state (zero_stage >= 1); all: the weights "
        "too (zero_stage 3).",
    )


class EarlyStopping(Section):
    """When a run ends because its validation loss does not get better."""

    patience: Count = Field(description="Evaluations in a row without a new best validation loss that end the run.")
    min_gain: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="A new best is below the one before by more than this."
    )


class TrainConfig(Section, check=checks.train):
    """How long, how much at once, and how precisely."""

    steps: Count | None = Field(description="Optimizer steps of the whole run; null: train.epochs says it.")
    epochs: Annotated[float, Field(gt=0.0, le=LARGEST_COUNT)] | None = Field(
        default=None,
        description="In place of train.steps: the run ends with the step after which the first dataset of data.train "
        "has been seen so often, whole or in part (0.5); its other datasets are mixed in by their weights. The data "
        "says how many steps that is. Of the two, one on the command line replaces the other in the file.",
    )
    global_batch_size: SizeOrRamp = Field(
        description="Sequences of one optimizer step, over all ranks; or a ramp, a list of [tokens, "
        "sequences]: the size of the steps that begin after so many trained tokens. Its first entry is at 0 tokens."
    )
    micro_batch_size: Size = Field(default=2, description="Sequences that one rank computes at once.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto",
        description="What the model computes in; auto: bf16 where all ranks' devices have units for it, else fp32. "
        "Under bf16 and fp16 the optimizer keeps fp32 weights.",
    )
    compile: Literal["auto", "off", "on"] = Field(
        default="auto",
        description="Compile each decoder layer with torch.compile before the first step; auto: on GPUs, but not under "
        "DeepSpeed's ZeRO 3, whose hooks fetch weights within a layer.",
    )
    deterministic: bool = Field(
        default=False,
        description="On GPUs too, the same losses to the last bit each time the same layout runs on the same kind of "
        "devices; slower. What cannot be deterministic is refused. On CPUs it is so anyway.",
    )
    gradient_clipping: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="The largest global L2 norm of the gradient; 0.0: no clipping."
    )
    eval_every_steps: Count = Field(
        default=50, description="Steps between evaluations on data.validation and of train.tasks."
    )
    tasks: Path | None = Field(
        default=None,
        description="A YAML file of tasks, answered at each evaluation as by `megatrain eval --tasks`; null: none.",
    )
    eval_batches: Count | None = Field(
        default=16,
        description="Global batches of an evaluation, the same ones each time; fewer where the data has fewer; null: "
        "all of the data.",
    )
    hang_timeout_seconds: Annotated[float, Field(gt=0.0)] = Field(
        default=600.0, description="Seconds without progress after which the run is stopped as hung."
    )
    check_replica_hash_interval: Count | None = Field(
        default=100,
        description="Steps between comparisons of the hashes of weights that several ranks must hold alike, to find "
        "silent data corruption; made before each save too. A difference ends the run; between tensor ranks, where it "
        "may be rounding, the first one is mended and reported. null: none.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="End when the loss on data.validation does not get better; null: at its last step."
    )
    initial_loss_scale_power: Annotated[int, Field(ge=0, le=32)] = Field(
        default=16, description="fp16: the loss scale starts at 2 to this power."
    )
    loss_scale_window: Count = Field(
        default=1000, description="fp16: steps without overflow after which the loss scale doubles."
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_are_in_place_of_steps(cls, given: Any) -> Any:
        by_epochs = isinstance(given, Mapping) and given.get("epochs") is not None
        return {"steps": None, **given} if by_epochs else given

    @property
    def max_batch_size(self) -> int:
        """The largest global_batch_size of any step."""
        return max(sizes_of(self.global_batch_size))


class SpikesConfig(Section, check=checks.spikes):
    """What is done about a step whose loss or gradient norm is a spike, and about updates that are left out."""

    action: Literal["none", "skip", "rewind"] = Field(
        default="none",
        description="skip: its update is left out; rewind: the run goes back to an earlier checkpoint and leaves out "
        "the batches from there to behind the spike.",
    )
    window_steps: Annotated[int, Field(ge=8, le=10_000)] = Field(
        default=128, description="The steps before it that a step is compared with; until there are so many, none is."
    )
    num_deviations: Annotated[float, Field(gt=0.0)] = Field(
        default=8.0,
        description="How many standard deviations above the median of those steps a spike is; the deviation is "
        "estimated by the median absolute deviation, and never less than 2% (loss) or 20% (norm) of the median.",
    )
    rewind_steps: Count = Field(
        default=100, description="rewind: to the newest checkpoint that is at least so many steps older than the spike."
    )
    margin_batches: Annotated[int, Field(ge=0, le=LARGEST_COUNT)] = Field(
        default=10, description="rewind: so many batches after that of the spike are left out too."
    )
    max_in_a_row: Count = Field(
        default=50,
        description="So many updates left out one after the other, for a spike or a gradient that is not finite, or so "
        "many returns to one checkpoint, end the run.",
    )


class OptimizerConfig(Section):
    """What updates the weights."""

    type: Literal["adamw"] = Field(default="adamw", description="AdamW: Adam with decoupled weight decay.")
    lr: Annotated[float, Field(ge=0.0)] = Field(description="The peak learning rate.")
    betas: Annotated[tuple[Probability, Probability], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="Decay of the running mean and of the running square of the gradient."
    )
    eps: Annotated[float, Field(gt=0.0)] = Field(default=1.0e-8, description="Added to the root of the running square.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=0.1, description="Decoupled weight decay of all weights but for no_weight_decay."
    )
    no_weight_decay: Annotated[tuple[WeightKind, ...], Field(strict=False)] = Field(
        default=("norms", "biases", "positions"),
        description="The kinds of weights that do not decay: norms (with their biases), biases (all others), positions "
        "(their embeddings), embeddings (all others; a tied head is one of them), matrices (all else).",
    )
    scale_parameter: bool = Field(
        default=False,
        description="As in Adafactor, and for T5: multiply the learning rate of each weight by the root mean square of "
        "its values (of the whole tensor), and at least by 0.001. Its decay stays lr x weight_decay.",
    )
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None,
        description="Keep an exponential moving average of the weights in fp32, for eval, generate and export with "
        "--ema: after update n, average x d + weight x (1 - d) with d = min(ema_decay, (1 + n) / (10 + n)). null: "
        "none.",
    )

    def decays(self, kind: WeightKind) -> bool:
        """Whether weights of this kind do, if there is any decay."""
        return kind not in self.no_weight_decay


class ScheduleConfig(Section, check=checks.schedule):
    """The learning rate over the steps."""

    type: Literal["cosine", "wsd", "linear", "constant", "inverse_sqrt"] = Field(
        default="cosine",
        description="After the warm-up; wsd: warm-up, stable, then a linear decay; inverse_sqrt: after n steps "
        "lr x sqrt(stable_steps / max(n, stable_steps)), whatever train.steps is.",
    )
    warmup_steps: Annotated[int, Field(ge=0, le=LARGEST_COUNT)] = Field(
        default=checks.DEFAULT_WARMUP_STEPS,
        description="Steps over which the learning rate rises from 0 to its peak. Left out, it is never more than "
        "the run.",
    )
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.1,
        description="The last learning rate as a share of the peak; constant and inverse_sqrt do not use it.",
    )
    decay_steps: Count | None = Field(default=None, description="wsd: steps of the decay; null: a fifth of all.")
    stable_steps: Count | None = Field(
        default=None,
        description="inverse_sqrt: steps, those of the warm-up included, before the rate falls; null: warmup_steps, as "
        "in Vaswani et al. 2017. T5's: warmup_steps 0, stable_steps 10000.",
    )


class CheckpointConfig(Section):
    """When state is saved, and how much of it is kept."""

    every_steps: Count = Field(default=50, description="Steps between checkpoints; the last step is always saved.")
    keep: Count = Field(default=3, description="The newest checkpoints kept.")
    keep_every_steps: Count | None = Field(
        default=None, description="The checkpoint of every n-th step is kept for good; null: none is."
    )
    keep_best: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="So many checkpoints with the lowest validation loss are kept too; only one saved at a step that "
        "was evaluated has such a loss.",
    )
    dir: str | None = Field(
        default=None,
        description="Where checkpoints lie: a path (kept as an absolute one), or the URL of an object store that "
        "fsspec knows, such as s3://bucket/run; null: checkpoints in run.dir.",
    )
    background: bool = Field(default=True, description="Training goes on while a checkpoint is written.")

    @field_validator("dir")
    @classmethod
    def _absolute(cls, place: str | None) -> str | None:
        """A path as an absolute one: a run that is started from another folder must find its checkpoints."""
        return str(pathlib.Path(in_home(place)).absolute()) if place and "://" not in place else place


class ObserveConfig(Section, check=checks.observe):
    """What is recorded."""

    log_every_steps: Count = Field(
        default=1,
        description="Steps between lines of metrics.jsonl and of the console. A run answers a signal, and completes "
        "a save in the background, after such a step; in between nothing is read from the device.",
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard events too.")
    trackers: Annotated[tuple[Literal["wandb", "mlflow"], ...], Field(strict=False)] = Field(
        default=(),
        description="Trackers that get the run's config, figures and evaluations: wandb (Weights & Biases), mlflow. "
        "Each is an extra: `pip install 'megatrain[wandb]'`.",
    )
    straggler_report_seconds: Annotated[float, Field(gt=0.0)] = Field(
        default=60.0,
        description="Seconds between comparisons of how long each part of a step takes on each rank, made at the next "
        "step that is logged; a rank that stays slower than the others is named.",
    )
    peak_flops: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="FLOP/s that one rank's device reaches at the most, by your own measurement: `mfu` is a share of "
        "it. null: a GPU's dense bf16 peak, from a table; none for a CPU or an unknown GPU, whose `mfu` is left out.",
    )


class LoraConfig(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021), trained in place of the weights of `run.init_from`, which are frozen.

    An adapted matrix W computes x W^T + alpha / rank * dropout(x) A^T B^T, with A [rank, in] and B [out, rank].
    Checkpoints hold the adapters alone. `lora: null`, the default, trains all weights.
    """

    rank: Size = Field(description="Between A and B; peft's `r`.")
    alpha: Annotated[float, Field(gt=0.0)] = Field(
        description="What an adapter adds is multiplied by alpha / rank; peft's `lora_alpha`."
    )
    dropout: Probability = Field(default=0.0, description="Share of an adapter's input dropped in training.")
    target_modules: Annotated[
        tuple[Text, ...],
        Field(strict=False, min_length=1),
        BeforeValidator(lambda x: (x,) if isinstance(x, str) else x),
    ] = Field(
        default=(ALL_LINEAR,),
        description="The matrices of each layer that are adapted, by Hugging Face's names (q_proj, mlp.c_proj); "
        "all-linear: all of them, but for the output head.",
    )

    def adapts(self, name: str) -> bool:
        """Whether the matrix of a layer with this name, or with this last part of it, gets an adapter; as in peft."""
        return any(f".{name}".endswith(f".{target}") or target == ALL_LINEAR for target in self.target_modules)


class RunConfig(Section, check=checks.across_sections):
    """The whole config of a run."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    spikes: SpikesConfig = SpikesConfig()
    optimizer: OptimizerConfig
    lora: LoraConfig | None = Field(default=None, description="LoRA adapters; null: all weights are trained.")
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    deepspeed: Mapping[str, JsonValue] = Field(
        default={},
        description="Passed through to DeepSpeed's own config, such as bucket sizes: keys that the parity and "
        "checkpoint tests have run with. All others are refused by name.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_run_warms_up_no_longer_than_it_is(cls, given: Any) -> Any:
        return checks.with_default_warmup(given)

    @property
    def predicted_share(self) -> float:
        """The share of a sample's tokens that the head predicts at, at most."""
        return self.objective.most_targets(self.model, self.data.seq_len) / self.data.seq_len

    @property
    def target_len(self) -> int | None:
        """Tokens of target in a sample of an encoder-decoder model; None: the model has one sequence."""
        objective = self.objective.of(self.model)
        if objective == "span_corruption":
            return corrupted_lengths(self.data.seq_len, self.objective.span_corruption).target
        return (self.objective.target_len or self.data.seq_len) if objective == "sequence_to_sequence" else None

    @property
    def gathers_by_layer(self) -> bool:
        """Whether each layer is called by itself: DeepSpeed's ZeRO 3 then gathers its weights, and an adapter is added;
        frozen weights have no gradient to compute while messages are under way."""
        is_zero_3 = self.parallel.engine == "deepspeed" and self.parallel.zero_stage == 3
        return is_zero_3 or self.lora is not None
