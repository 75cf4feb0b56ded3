"""Rules that span several keys: what each section, and the config as a whole, must satisfy on any number of ranks.

Each function takes a section whose keys are right one by one, and gives all that is wrong with them together.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from megatrain.config.arithmetic import divisors_around, multiples_around
from megatrain.config.batch_size import BatchSize
from megatrain.config.corruption import corrupted_lengths
from megatrain.config.deepspeed_keys import deepspeed
from megatrain.config.problem import Problem, alternatives, as_yaml
from megatrain.families import FAMILIES

if TYPE_CHECKING:
    from megatrain.config import schema
    from megatrain.config.schema import Section

DEFAULT_WARMUP_STEPS = 20
SHORTEST_ALONE = 3


def unused(section: Section, keys: tuple[str, ...], why: str) -> list[Problem]:
    """A problem for each of the keys that was moved from its default though nothing reads it."""
    fields = type(section).model_fields
    moved = ((key, getattr(section, key)) for key in keys if getattr(section, key) != fields[key].default)
    return [Problem(key, value, why, f"{key} left out", is_value=False) for key, value in moved]


def rope_scaling(scaling: schema.RopeScaling) -> list[Problem]:
    """llama3 needs all of its keys, linear none of them."""
    own = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if scaling.rope_type == "linear":
        return unused(scaling, own, "used by rope_type llama3 only")
    missing = [
        Problem(key, None, "needed by rope_type llama3", usual)
        for key, usual in zip(own, ("1.0", "4.0", "8192"), strict=True)
        if getattr(scaling, key) is None
    ]
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is not None and high is not None and low >= high:
        missing.append(Problem("low_freq_factor", low, f"must be less than high_freq_factor ({high})"))
    return missing


def model(config: schema.ModelConfig) -> list[Problem]:
    """Heads divide what they share, and no key is set that the family does not read."""
    problems = []
    heads, hidden = config.num_attention_heads, config.hidden_size
    if config.head_dim is None and hidden % heads:
        reason = f"must be divisible by num_attention_heads ({heads}) where head_dim is null"
        problems.append(Problem("hidden_size", hidden, reason, alternatives(multiples_around(hidden, heads))))
    names = config.description.hugging_face.names
    if "num_key_value_heads" not in names and config.kv_heads != heads:
        reason = f"family {config.family} has as many as num_attention_heads ({heads})"
        problems.append(Problem("num_key_value_heads", config.kv_heads, reason, "null"))
    elif heads % config.kv_heads:
        reason = f"must divide num_attention_heads ({heads})"
        problems.append(
            Problem(
                "num_key_value_heads", config.kv_heads, reason, alternatives(divisors_around(config.kv_heads, heads))
            )
        )
    if "head_dim" not in names and config.head_dim is not None and config.head_dim * heads != hidden:
        reason = f"family {config.family} has hidden_size / num_attention_heads ({hidden} / {heads})"
        problems.append(Problem("head_dim", config.head_dim, reason, "null"))
    elif config.description.block.attention.rotates and config.head_size % 2 and not problems:
        reason = "the width of a head must be even for the rotary embedding"
        problems.append(Problem("head_dim", config.head_size, reason, str(config.head_size + 1)))
    if config.description.reads_images:
        problems += _of_images(config)
    if (misfit := config.description.misfit(config)) is not None:
        problems.append(Problem(misfit.key, getattr(config, misfit.key), misfit.reason, misfit.nearest))
    if "layer_norm_epsilon" in config.description.some_keys and "layer_norm_epsilon" not in names:
        default = type(config).model_fields["layer_norm_epsilon"].default
        problems += unused(config, ("layer_norm_epsilon",), f"is {default} in family {config.family}")
    if config.attention not in ("auto", "math") and config.attention_dropout:
        reason = "no fused kernel drops by seed and position, as model.attention_dropout does"
        problems.append(Problem("attention", config.attention, reason, "auto"))
    if config.attention not in ("auto", "math") and config.description.block.attention.relative_bias:
        reason = f"no fused kernel adds the trained bias of family {config.family}"
        problems.append(Problem("attention", config.attention, reason, "auto"))
    if config.attention == "cudnn" and config.attention_window is not None:
        reason = "cuDNN is used without masks, which a sliding window needs"
        problems.append(Problem("attention", config.attention, reason, "flash"))
    return problems + relative_bias(config) + _of_other_families(config)


def with_defaults_of_family(given: Any) -> Any:
    """The model as given, with what its family takes for keys that are left out."""
    family = FAMILIES.get(str(given.get("family"))) if isinstance(given, Mapping) else None
    if family is None:
        return given
    given = {**family.defaults, **given}
    return {**family.implied(given), **given}


def relative_bias(config: schema.ModelConfig) -> list[Problem]:
    """Half of the ranges of distances are of one distance each, in both directions of an encoder."""
    table = config.description.block.attention.relative_bias
    if table is None:
        return []
    num_buckets, distance = config.sizes["buckets"], getattr(config, table.distance_key)
    if num_buckets % 4:
        nearest = alternatives(multiples_around(num_buckets, 4))
        return [Problem("relative_attention_num_buckets", num_buckets, "must be divisible by 4", nearest)]
    if distance <= num_buckets // 2:
        reason = f"must be more than half of relative_attention_num_buckets ({num_buckets})"
        return [Problem(table.distance_key, distance, reason, str(num_buckets // 2 + 1))]
    return []


def _of_images(config: schema.ModelConfig) -> list[Problem]:
    """Patches cover the image."""
    problems, size, patch = [], getattr(config, "image_size"), getattr(config, "patch_size")  # noqa: B009
    if size % patch:
        reason = f"must divide image_size ({size})"
        problems.append(Problem("patch_size", patch, reason, alternatives(divisors_around(patch, size))))
    if (channels := config.sizes["channels"]) not in (1, 3):
        problems.append(Problem("num_channels", channels, "images have 3 channels (color) or 1 (gray)", "3"))
    return problems


def _of_other_families(config: schema.ModelConfig) -> list[Problem]:
    """A problem for each key that was set though only other families read it."""
    problems = []
    for key in type(config).model_fields:
        readers = [name for name, each in FAMILIES.items() if key in each.some_keys]
        if readers and config.family not in readers:
            only = f"family {readers[0]} only" if len(readers) == 1 else f"{', '.join(readers)}, not by {config.family}"
            problems += unused(config, (key,), f"read by {only}")
    return problems


def fill_in_the_middle(config: schema.FillInTheMiddle) -> list[Problem]:
    """Three sentinels, all different."""
    tokens = {"prefix_token": config.prefix_token, "middle_token": config.middle_token}
    tokens["suffix_token"] = config.suffix_token
    texts = list(tokens.values())
    twice = [key for number, key in enumerate(tokens) if tokens[key] in texts[:number]]
    return [Problem(key, tokens[key], "another sentinel has this token already") for key in twice]


def spans(config: schema.Spans) -> list[Problem]:
    if config.sentinel_token.count("{}") == 1:
        return []
    reason = "must have {} for the number of the sentinel"
    return [Problem("sentinel_token", config.sentinel_token, reason, "<extra_id_{}>")]


def training_dataset(config: schema.TrainingDataset) -> list[Problem]:
    """A document gets one of fill-in-the-middle and span corruption at most; a function is named with its module."""
    problems = []
    if config.fill_in_the_middle and config.span_corruption:
        left = 1.0 - config.fill_in_the_middle.rate
        if config.span_corruption.rate > left:
            reason = "a document gets this or fill_in_the_middle: their rates must add up to 1.0 at most"
            problems.append(Problem("span_corruption.rate", config.span_corruption.rate, reason, str(round(left, 6))))
    if config.transform and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", config.transform):
        problems.append(Problem("transform", config.transform, "must be module:function, such as my_package.code:mask"))
    return problems


def data(config: schema.DataConfig) -> list[Problem]:
    """Some dataset must have a share; packed documents lie in no order that could be learned."""
    problems = []
    if not any(dataset.weight for dataset in config.train):
        problems.append(Problem("train.0.weight", config.train[0].weight, "the weights must not all be zero", "1.0"))
    if config.score_after_eod and config.packing == "best_fit":
        reason = "with packing: best_fit what follows a document is filling, or chosen by its length"
        problems.append(Problem("score_after_eod", True, reason, "false"))
    return problems


def parallel(config: schema.ParallelConfig) -> list[Problem]:
    """What needs no model and no number of ranks to be wrong is in plan.rules with the other layout rules."""
    if config.recompute == "full":
        return []
    return unused(config, ("recompute_every",), f"used with recompute: full only (it is {config.recompute})")


def train(config: schema.TrainConfig) -> list[Problem]:
    """One key says how long the run is. A ramp begins with it, and its tokens rise. Loss scaling belongs to fp16."""
    problems = _batch_size_ramp(config.global_batch_size)
    if config.steps is None and config.epochs is None:
        problems.append(Problem("steps", None, "must be an integer, unless train.epochs is given in its place"))
    elif config.steps is not None and config.epochs is not None:
        reason = f"train.steps is given too ({config.steps}): one of the two says how long the run is"
        problems.append(Problem("epochs", config.epochs, reason, "one of them left out", is_value=False))
    if config.precision != "fp16":
        keys = ("initial_loss_scale_power", "loss_scale_window")
        problems += unused(config, keys, f"used with precision: fp16 only (it is {config.precision})")
    return problems


def _batch_size_ramp(given: BatchSize) -> list[Problem]:
    starts = (0,) if isinstance(given, int) else tuple(tokens for tokens, _ in given)
    if starts[0] != 0:
        return [Problem("global_batch_size", given, f"the first entry must begin at 0 tokens, not at {starts[0]}")]
    falls = (f"{after} follows {before}" for before, after in pairwise(starts) if after <= before)
    return [Problem("global_batch_size", given, f"the tokens of its entries must rise: {text}") for text in falls]


def spikes(config: schema.SpikesConfig) -> list[Problem]:
    """What finds a spike needs an action, and what leads back needs the one that goes back."""
    problems = []
    if config.action == "none":
        problems += unused(config, ("window_steps", "num_deviations"), "used with action: skip or rewind only")
    if config.action != "rewind":
        problems += unused(config, ("rewind_steps", "margin_batches"), "used with action: rewind only")
    return problems


def schedule(config: schema.ScheduleConfig) -> list[Problem]:
    """decay_steps belongs to wsd; stable_steps to inverse_sqrt, which falls from its first step on without any."""
    problems = [] if config.type == "wsd" else unused(config, ("decay_steps",), "used with type: wsd only")
    if config.type != "inverse_sqrt":
        return problems + unused(config, ("stable_steps",), "used with type: inverse_sqrt only")
    warmup, stable = config.warmup_steps, config.stable_steps
    if stable is None and warmup == 0:
        reason = "must be given for inverse_sqrt without warm-up (schedule.warmup_steps is 0)"
        problems.append(Problem("stable_steps", None, reason, "10000"))
    if stable is not None and stable < warmup:
        reason = f"includes the warm-up: must be at least schedule.warmup_steps ({warmup})"
        problems.append(Problem("stable_steps", stable, reason, str(warmup)))
    return problems


def with_default_warmup(given: Any) -> Any:
    """The config as given, with schedule.warmup_steps = train.steps where it was left out and its default is longer."""
    if not isinstance(given, Mapping):
        return given
    steps = given["train"].get("steps") if isinstance(given.get("train"), Mapping) else None
    section = given.get("schedule", {})
    if not isinstance(section, Mapping) or "warmup_steps" in section:
        return given
    if type(steps) is int and 0 < steps < DEFAULT_WARMUP_STEPS:
        return {**given, "schedule": {**section, "warmup_steps": steps}}
    return given


def observe(config: schema.ObserveConfig) -> list[Problem]:
    """Each tracker gets a run once."""
    named = list(dict.fromkeys(config.trackers))
    if len(named) == len(config.trackers):
        return []
    return [Problem("trackers", list(config.trackers), "names a tracker twice", f"[{', '.join(named)}]")]


def across_sections(config: schema.RunConfig) -> list[Problem]:
    """What one section says about another: context against samples, warm-up against steps, DeepSpeed's own keys."""
    problems = []
    longest, places = config.model.max_position_embeddings, config.model.num_places
    if places is not None:
        if config.data.seq_len != places:
            reason = "the tokens of an image are its patches and the class token"
            problems.append(Problem("data.seq_len", config.data.seq_len, reason, str(places)))
    elif config.data.seq_len > longest:
        reason = f"must be at most model.max_position_embeddings ({longest})"
        problems.append(Problem("data.seq_len", config.data.seq_len, reason, str(longest)))
    if config.train.deterministic and config.model.attention == "cudnn":
        reason = "cuDNN's backward pass is not deterministic, as train.deterministic asks for"
        problems.append(Problem("model.attention", "cudnn", reason, "flash"))
    problems += objective(config)
    if (rule := config.train.early_stopping) is not None and not config.data.validation:
        problems.append(Problem("train.early_stopping", rule.model_dump(), "needs datasets in data.validation", "null"))
    problems += lora(config)
    if config.run.init_from_ema and (config.run.init_from is None or config.lora is not None):
        reason = "takes the averaged weights of run.init_from, which is null"
        if config.lora is not None:
            reason = "adapters (lora) stand beside the weights themselves: `megatrain export --ema` makes a folder of "
            reason += "the averaged ones, for run.init_from"
        problems.append(Problem("run.init_from_ema", True, reason, "false"))
    if config.run.resize_token_embeddings and (config.run.init_from is None or config.lora is not None):
        reason = "adds rows to the weights of run.init_from, which is null"
        if config.lora is not None:
            reason = (
                "adds rows to the embeddings, which adapters (lora) do not train: they would stay as they are drawn"
            )
        problems.append(Problem("run.resize_token_embeddings", True, reason, "false"))
    elif config.run.resize_token_embeddings and config.model.target_vocab_size != config.model.vocab_size:
        reason = "adds the tokens of one tokenizer, and the model has a vocabulary of source and one of target"
        problems.append(Problem("run.resize_token_embeddings", True, reason, "false"))
    if config.run.new_head and (config.run.init_from is None or config.lora is not None):
        reason = "takes the place of the head of run.init_from, which is null"
        if config.lora is not None:
            reason = "begins with a head that adapters (lora) do not train: it would stay as it is drawn"
        problems.append(Problem("run.new_head", True, reason, "false"))
    if config.train.epochs is not None and not config.data.train[0].weight:
        reason = "counts how often data.train.0 is seen, whose weight is 0"
        nearest = "train.steps in its place"
        problems.append(Problem("train.epochs", config.train.epochs, reason, nearest, is_value=False))
    if config.train.steps is not None:
        problems += length(config, config.train.steps, "train.steps")
    if config.checkpoint.keep_best and not config.data.validation:
        reason = "keeps nothing: without data.validation no checkpoint has a validation loss"
        problems.append(Problem("checkpoint.keep_best", config.checkpoint.keep_best, reason, "0"))
    kept = config.checkpoint.keep * config.checkpoint.every_steps
    if config.spikes.action == "rewind" and config.spikes.rewind_steps > kept:
        reason = f"must be at most checkpoint.keep * checkpoint.every_steps ({kept}): older ones are deleted"
        problems.append(Problem("spikes.rewind_steps", config.spikes.rewind_steps, reason, str(kept)))
    if config.parallel.engine != "deepspeed" and config.deepspeed:
        reason = f"passed on with parallel.engine: deepspeed only (it is {config.parallel.engine})"
        left_out = Problem("deepspeed", dict(config.deepspeed), reason, "deepspeed left out", is_value=False)
        return [*problems, left_out]
    return [*problems, *deepspeed(config.deepspeed)]


def objective(config: schema.RunConfig) -> list[Problem]:
    """The family must have it; and how it makes samples is not said by the keys of another one."""
    kind, known = config.objective.of(config.model), config.model.description.objectives
    if kind not in known:
        return [Problem("objective.type", kind, _untrainable(config.model, kind), known[0])]
    problems, own = [], config.objective
    if kind != "sequence_to_sequence":
        problems += _unused_below(
            "objective.", own, ("target_len",), f"used with sequence_to_sequence only (it is {kind})"
        )
    for name in ("masked_lm", "span_corruption", "image_classification"):
        if kind != name:
            section = getattr(own, name)
            why = f"used with objective {name} only (it is {kind})"
            problems += _unused_below(f"objective.{name}.", section, tuple(type(section).model_fields), why)
    if kind in ("masked_lm", "sequence_classification"):
        problems += _alone(config, kind)
    elif kind == "image_classification":
        problems += _images(config)
    elif kind != "next_token":
        problems += _pairs(config, kind)
    return problems


def _untrainable(model: schema.ModelConfig, kind: str) -> str:
    """Why a model is not trained by an objective."""
    family, known = FAMILIES[model.family], ", ".join(model.description.objectives)
    if kind in family.objectives:
        return f"needs model.num_labels null (it is {model.sizes['labels']}): with it the head classifies texts"
    if family.classifier and kind in family.classifier.objectives:
        return "needs model.num_labels: as many labels as the data has"
    return f"family {model.family} is trained by {known}"


def _alone(config: schema.RunConfig, kind: str) -> list[Problem]:
    """Where documents are read from both sides, each is by itself, unchanged."""
    problems = []
    for key, needed in (("packing", "best_fit"), ("document_mask", True)):
        if (value := getattr(config.data, key)) != needed:
            reason = f"{kind} reads each document of a sample by itself"
            problems.append(Problem(f"data.{key}", value, reason, as_yaml(needed)))
    for number, dataset in enumerate(config.data.train):
        for key in ("fill_in_the_middle", "span_corruption", "token_masking", "transform"):
            if (value := getattr(dataset, key)) is not None:
                reason = f"{kind} changes no document"
                reason += ": it hides tokens itself" if kind == "masked_lm" else ""
                problems.append(Problem(f"data.train.{number}.{key}", str(value), reason, "null"))
    if (problem := too_short(kind, config.data.seq_len)) is not None:
        problems.append(Problem("data.seq_len", config.data.seq_len, problem, str(SHORTEST_ALONE)))
    if config.train.tasks is not None:
        reason = f"tasks are answered by models that write, and {kind} trains none"
        problems.append(Problem("train.tasks", config.train.tasks, reason, "null"))
    return problems


def too_short(kind: str, seq_len: int) -> str | None:
    """Why an objective makes no samples of ``seq_len``; None: it does."""
    if seq_len >= SHORTEST_ALONE:
        return None
    if kind in ("masked_lm", "sequence_classification"):
        return f"a sample of {kind} has a token and what begins and ends its document"
    return "must hold a token that stays, a sentinel and the end" if kind == "span_corruption" else None


def _pairs(config: schema.RunConfig, kind: str) -> list[Problem]:
    """What an encoder-decoder model is trained on is cut into samples in a way of its own."""
    problems = []
    why = f"not read where objective.type is {kind}"
    problems += _unused_below("data.", config.data, ("document_mask", "packing", "score_after_eod"), why)
    for number, dataset in enumerate(config.data.train):
        keys = ("fill_in_the_middle", "span_corruption", "token_masking", "transform")
        problems += _unused_below(f"data.train.{number}.", dataset, keys, why)
    if kind == "span_corruption" and config.model.target_vocab_size != config.model.vocab_size:
        reason = "source and target are one text, and the model has a vocabulary for each"
        problems.append(Problem("model.decoder_vocab_size", config.model.target_vocab_size, reason, "null"))
    if kind == "span_corruption":
        problems += _corruption(config.data.seq_len, config.objective.span_corruption)
    if config.train.precision == "fp16" and config.model.description.block.attention.relative_bias:
        reason = f"overflows in the layers of family {config.model.family}"
        problems.append(Problem("train.precision", "fp16", reason, "bf16"))
    longest = config.model.max_position_embeddings
    if config.data.seq_len > longest or (target_len := config.target_len or 0) <= longest:
        return problems
    if kind == "span_corruption":
        reason = f"makes targets of {target_len} tokens, more than model.max_position_embeddings ({longest})"
        return [*problems, Problem("data.seq_len", config.data.seq_len, reason)]
    reason = f"must be at most model.max_position_embeddings ({longest})"
    return [*problems, Problem("objective.target_len", target_len, reason, str(longest))]


def _images(config: schema.RunConfig) -> list[Problem]:
    """What is there for text alone has no meaning for images; numbers for channels are as many as there are."""
    problems, channels = [], config.model.sizes["channels"]
    for key in ("image_mean", "image_std"):
        given = getattr(config.objective.image_classification, key)
        if len(given) not in (1, channels):
            reason = f"must have one number, or one for each of model.num_channels ({channels})"
            problems.append(Problem(f"objective.image_classification.{key}", list(given), reason, "[0.5]"))
    data, tasks = config.data, config.train.tasks
    of_text: dict[str, tuple[object, object]] = {"data.packing": (data.packing, "concat")}
    of_text |= {"data.document_mask": (data.document_mask, False), "train.tasks": (tasks, None)}
    for number, dataset in enumerate(config.data.train):
        for key in ("fill_in_the_middle", "span_corruption", "token_masking", "transform"):
            of_text[f"data.train.{number}.{key}"] = getattr(dataset, key), None
    for key, (value, needed) in of_text.items():
        if value != needed:
            problems.append(Problem(key, str(value), "is for text, and this run reads images", as_yaml(needed)))
    return problems


def image_classification(config: schema.ImageClassificationConfig) -> list[Problem]:
    """Nothing is divided by zero; and a mean is one of pixels in [0, 1], not of those up to 255."""
    problems = []
    if not all(value > 0.0 for value in config.image_std):
        problems.append(Problem("image_std", list(config.image_std), "every number must be above 0", "[0.5]"))
    if not all(0.0 <= value <= 1.0 for value in config.image_mean):
        reason = "every number must be in [0, 1], as pixels are: divide those of pixels up to 255 by 255"
        problems.append(Problem("image_mean", list(config.image_mean), reason, "[0.5]"))
    return problems


def masked_lm(config: schema.MaskedLMConfig) -> list[Problem]:
    """What is masked and what is random are shares of one whole."""
    left = round(1.0 - config.mask_replace_prob, 6)
    if config.random_replace_prob <= left:
        return []
    reason = f"must be at most 1 - mask_replace_prob ({left:g})"
    return [Problem("random_replace_prob", config.random_replace_prob, reason, f"{left:g}")]


def _corruption(seq_len: int, spans: schema.Spans) -> list[Problem]:
    """There must be a text whose source fills a sample."""
    if (reason := too_short("span_corruption", seq_len)) is not None:
        return [Problem("data.seq_len", seq_len, reason, str(SHORTEST_ALONE))]
    if corrupted_lengths(seq_len, spans).source == seq_len:
        return []
    reason = f"spans so short leave no token between them where {spans.corrupted} of the text is in spans"
    return [Problem("objective.span_corruption.mean_span_tokens", spans.mean_span_tokens, reason, "3.0")]


def _unused_below(prefix: str, section: Section, keys: tuple[str, ...], why: str) -> list[Problem]:
    return [problem.below(prefix) for problem in unused(section, keys, why)]


def lora(config: schema.RunConfig) -> list[Problem]:
    """Adapters change given weights, and stand beside matrices that the family has."""
    if config.lora is None:
        return []
    problems = []
    if config.run.init_from is None:
        problems.append(Problem("run.init_from", None, "names the checkpoint whose weights lora adapts"))
    family = config.model.description
    names = family.adapted(lambda name: True)
    known = dict.fromkeys([name.rpartition(".")[2] for name in names] + names)
    outer = {layer.name.rpartition(".")[2] for layer in family.outer_layers}
    short = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    for number, target in enumerate(config.lora.target_modules):
        if target in known or target == "all-linear":
            continue
        reason = f"must be all-linear or a matrix of a {config.model.family} layer ({short})"
        if target.rpartition(".")[2] in outer:
            tied = ": here they are one weight (model.tie_word_embeddings)" if config.model.is_tied else ""
            reason = f"embeddings and the output head get no adapters{tied}"
        close = difflib.get_close_matches(target, [*known, "all-linear"], n=1, cutoff=0.5)
        problems.append(Problem(f"lora.target_modules.{number}", target, reason, next(iter(close), "all-linear")))
    return problems


def length(config: schema.RunConfig, steps: int, name: str) -> list[Problem]:
    """What must fit into the steps of the run. ``name``: what the user knows them by."""
    problems = []
    warmup, decay = config.schedule.warmup_steps, config.schedule.decay_steps
    if "warmup_steps" not in config.schedule.model_fields_set:
        warmup = min(warmup, steps)
    if warmup > steps:
        reason = f"must be at most {name} ({steps})"
        problems.append(Problem("schedule.warmup_steps", warmup, reason, str(steps)))
    elif decay is not None and warmup + decay > steps:
        reason = f"must be at most {name} - schedule.warmup_steps ({steps} - {warmup})"
        problems.append(Problem("schedule.decay_steps", decay, reason, str(steps - warmup)))
    return problems + _kept(config, steps, name)


def _kept(config: schema.RunConfig, steps: int, name: str) -> list[Problem]:
    """`keep_every_steps` and `keep_best` must find a checkpoint in the steps of the run."""
    problems = []
    kept = config.checkpoint
    nth, every, evaluated = kept.keep_every_steps, kept.every_steps, config.train.eval_every_steps
    if nth is not None and steps % nth and math.lcm(nth, every) > steps:
        reason = f"keeps nothing: no step up to {name} ({steps}) is a multiple of it and is saved ("
        reason += f"checkpoint.every_steps is {every})"
        problems.append(Problem("checkpoint.keep_every_steps", nth, reason, str(every) if every <= steps else "null"))
    if kept.keep_best and config.data.validation and max(every, evaluated) < steps <= math.lcm(every, evaluated):
        reason = f"keeps nothing: no step before the last is both saved (checkpoint.every_steps is {every}) and "
        reason += f"evaluated (train.eval_every_steps is {evaluated}); make one a multiple of the other"
        problems.append(Problem("checkpoint.keep_best", kept.keep_best, reason))
    return problems
