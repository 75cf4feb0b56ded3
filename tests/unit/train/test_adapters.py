"""LoRA's adapters: exports that peft loads, merged ones that transformers loads, and adapters of peft's imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_convert import model_of, save
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import megatrain
from megatrain.errors import CheckpointError, ConfigError
from megatrain.train.convert import export_checkpoint, import_folder
from tests.runs import TinyData, finished_config, write_config
from tests.served import ServedRanks

CASES: dict[str, tuple[str, Any, int]] = {  # family, target modules, matrices of a layer that these are
    "llama, all": ("llama", "all-linear", 7),
    "llama, some": ("llama", ["q_proj", "v_proj", "mlp.down_proj"], 3),
    "qwen3": ("qwen3", ["k_proj", "o_proj"], 2),
    "gpt2, all": ("gpt2", "all-linear", 4),
    "gpt2, fused": ("gpt2", ["c_attn"], 1),
    "gpt2, square": ("gpt2", ["attn.c_proj"], 1),
}
TOKENS = torch.arange(7, 67).view(2, 30)


def make_adapter(family: str, targets: Any, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A model with random adapters, saved as peft does; in ``base`` its base, and its import in ``checkpoint``."""
    import_folder(save(model_of(family, tied=True, dtype=dtype), folder / "base"), folder / "checkpoint")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    adapted = get_peft_model(base, LoraConfig(r=6, lora_alpha=21, target_modules=targets)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(folder / "peft")
    return adapted


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits.float()
    return found


@pytest.mark.filterwarnings("error:.*(missing|unexpected|Missing|Unexpected)")
@pytest.mark.parametrize("case", CASES)
def test_adapters_go_to_peft_and_back(case: str, tmp_path: Path) -> None:
    family, targets, num_adapted = CASES[case]
    expected = logits(make_adapter(family, targets, tmp_path))
    import_folder(tmp_path / "peft", tmp_path / "adapters", tmp_path / "checkpoint")
    ours = megatrain.load(tmp_path / "adapters").logits(TOKENS)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    exported = export_checkpoint(tmp_path / "adapters", tmp_path / "out")
    assert (exported.reader, "--merge" in exported.notes[0]) == ("peft", True)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "out"))
    assert len(after) == 2 * 2 * num_adapted
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "out").eval()), ours, atol=1e-5, rtol=1e-5
    )
    export_checkpoint(tmp_path / "adapters", tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), ours, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().max() > 0.1
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["fan_in_fan_out"] == (family == "gpt2")


TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.1,
}
ENCODERS: dict[str, tuple[Any, Any, Any, list[str]]] = {
    "bert": (BertForMaskedLM, BertConfig(**TINY, vocab_size=131), TOKENS, ["query", "output.dense"]),
    "classifier": (
        BertForSequenceClassification,
        BertConfig(**TINY, vocab_size=131, num_labels=3),
        TOKENS,
        ["key", "intermediate.dense"],
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig(**TINY, image_size=12, patch_size=4, num_labels=3),
        torch.linspace(-1, 1, 864).view(2, 3, 12, 12),
        ["v_proj", "o_proj", "fc1", "fc2"],
    ),
}


@pytest.mark.filterwarnings("error:.*(missing|unexpected|Missing|Unexpected)")
@pytest.mark.parametrize("case", ENCODERS)
def test_adapters_of_encoders_reach_peft(case: str, tmp_path: Path) -> None:
    kind, config, inputs, targets = ENCODERS[case]
    torch.manual_seed(3)
    model = kind(config).eval()
    if case == "vit" and not hasattr(model.vit, "layers"):
        pytest.skip("this transformers' ViT has modules of other names")
    model.save_pretrained(tmp_path / "base")
    import_folder(tmp_path / "base", tmp_path / "checkpoint")
    adapted = get_peft_model(model, LoraConfig(r=6, lora_alpha=21, target_modules=targets)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "peft")
    import_folder(tmp_path / "peft", tmp_path / "adapters", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "adapters", tmp_path / "out")
    export_checkpoint(tmp_path / "adapters", tmp_path / "merged", merge=True)
    again = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    merged = kind.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = adapted(inputs).logits
        torch.testing.assert_close(again(inputs).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged(inputs).logits, expected, atol=1e-5, rtol=1e-5)
        with adapted.disable_adapter():
            assert (adapted(inputs).logits - expected).abs().max() > 0.01


def test_merging_rounds_half_precision_once(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """As far as bf16 goes: half of the distance between neighbors, 2^-9 of each weight."""
    adapted = make_adapter("llama", ["q_proj"], tmp_path, torch.bfloat16)
    import_folder(tmp_path / "peft", tmp_path / "adapters", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "adapters", tmp_path / "merged", merge=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for layer in range(2):
        module = adapted.base_model.model.model.layers[layer].self_attn.q_proj
        product = module.lora_B["default"].weight.float() @ module.lora_A["default"].weight.float()
        exact = module.base_layer.weight.float() + product * (21 / 6)
        found = merged[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert found.dtype == torch.bfloat16
        farthest = ((found.float() - exact).abs() / exact.abs()).max().item()
        record_property(f"layer {layer}: the farthest weight, as a share of itself", f"{farthest:.2e}")
        assert 2**-12 < farthest <= 2**-8


def test_what_peft_can_do_beyond_is_refused(tmp_path: Path) -> None:
    make_adapter("llama", ["q_proj"], tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())

    def import_with(**changes: Any) -> None:
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        import_folder(tmp_path / "peft", tmp_path / "adapters", tmp_path / "checkpoint")

    for key, value in {
        "use_dora": True,
        "bias": "all",
        "rank_pattern": {"q": 2},
        "modules_to_save": ["lm_head"],
    }.items():
        with pytest.raises(CheckpointError, match=key):
            import_with(**{key: value})
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    one = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for kept, says in (
        ({name: x for name, x in tensors.items() if name != one}, "lacks 1 of the adapters' tensors"),
        ({**tensors, one.replace("layers.0", "layers.9"): torch.zeros(1)}, "1 tensors that the model does not adapt"),
    ):
        save_file(kept, tmp_path / "peft" / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=says):
            import_with()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_A.weight has shape \[6, 32\], and \[5, 32\] here"):
        import_with(r=5)
    with pytest.raises(ConfigError, match="--base"):
        import_folder(tmp_path / "peft", tmp_path / "adapters")
    with pytest.raises(ConfigError, match="no LoRA adapters: leave it out"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", merge=True)


def test_another_base_is_refused(tmp_path: Path) -> None:
    make_adapter("llama", ["q_proj"], tmp_path)
    import_folder(tmp_path / "peft", tmp_path / "adapters", tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    other = save(model_of("llama", tied=False), tmp_path / "other")
    import_folder(other, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="other weights"):
        export_checkpoint(tmp_path / "adapters", tmp_path / "merged", merge=True)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"zero_stage": 3}], ids=str)
def test_a_run_continues_peft_adapters_under_every_layout(
    parallel: dict[str, Any], tiny_data: TinyData, finished_run: Path, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    export_checkpoint(finished_run, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"])).save_pretrained(
        tmp_path / "peft"
    )
    import_folder(tmp_path / "peft", tmp_path / "adapters", finished_run)
    config = finished_config(tiny_data, tmp_path / "run")
    config |= {"lora": {"rank": 4, "alpha": 9.0, "target_modules": ["q_proj", "down_proj"]}, "parallel": parallel}
    config["run"] = {**config["run"], "init_from": str(tmp_path / "adapters")}
    config["optimizer"] = {"lr": 1.0e-2}
    two_ranks.finish(write_config(tmp_path / "run.yaml", config))
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    export_checkpoint(tmp_path / "run", tmp_path / "merged", merge=True)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert all(tensor.count_nonzero() for tensor in tensors.values())
    ours = megatrain.load(tmp_path / "run").logits(TOKENS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(plain) - ours).abs().max() > 1e-3
    with_adapters = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    torch.testing.assert_close(logits(with_adapters), ours, atol=1e-5, rtol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), ours, atol=1e-5, rtol=1e-5)
