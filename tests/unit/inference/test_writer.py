"""What `generate` shows is the text of prompt and new tokens decoded as a whole, with tokenizers of every shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from megatrain.checkpoint.manifest import SpecialTokens, Token
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import CheckpointError, ConfigError
from megatrain.inference.assets import Assets
from megatrain.inference.loading import load_decoder
from megatrain.inference.text_stream import TextStream
from megatrain.inference.writer import TextSettings, Writer, generate_text, open_writer
from megatrain.model.beams import BeamSearch
from megatrain.model.generate import Limits, Sampling, generate, generate_batch
from megatrain.train.convert import import_folder
from tests.tokenizer_samples import bert, gemma, llama2, llama3, numbered, t5


def checkpoint(library: Library, folder: Path, ruin: float = 0.0) -> Path:
    """Of a model with random weights that knows all ids of the tokenizer; ``ruin`` is added to its last norm."""
    torch.manual_seed(0)
    size = max(library.get_vocab().values()) + 1
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.model.norm.weight.data += ruin
    model.save_pretrained(folder / "hf")
    library.save(str(folder / "hf" / "tokenizer.json"))
    import_folder(folder / "hf", folder / "checkpoint")
    return folder / "checkpoint"


def generated(path: Path, prompt: str, warnings: list[str], num_new: int = 5) -> str:
    settings = TextSettings(num_new, Sampling(1.0), seed=5)
    return "".join(generate_text(path, prompt, settings, warn=warnings.append))


@pytest.mark.parametrize(("make", "num_new"), [(llama2, 60), (llama3, 60), (gemma, 20), (t5, 20), (bert, 20)])
def test_generated_text_is_decoded_with_its_prompt(make: Callable[[], Library], num_new: int, tmp_path: Path) -> None:
    library, prompt = make(), "to be"
    path = checkpoint(library, tmp_path)
    ids = library.encode(prompt, add_special_tokens=False).ids
    new = list(
        generate(
            load_decoder(CheckpointReader(path)), ids, Limits(num_new, (), library.get_vocab_size()), Sampling(1.0), 5
        )
    )
    assert len(new) == num_new
    begin = library.decode(ids, skip_special_tokens=False)
    whole = library.decode(ids + new, skip_special_tokens=False)
    assert whole.startswith(begin)
    warnings: list[str] = []
    assert generated(path, prompt, warnings, num_new) == prompt + whole[len(begin) :]
    assert not warnings


def test_a_vocabulary_with_holes_can_be_prompted(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"to": 0, "be": 7, "or": 90, "?": 91}, "?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    warnings: list[str] = []
    assert generated(checkpoint(library, tmp_path), "to be or", warnings).startswith("to be or")
    assert not warnings


def test_characters_of_the_prompt_without_tokens_are_told(tmp_path: Path) -> None:
    library = Library(models.BPE(numbered(["a", "b", " "]), []))
    warnings: list[str] = []
    generated(checkpoint(library, tmp_path), "ab \u4e2d\u6587", warnings)
    assert len(warnings) == 1
    assert "2 of 5 characters" in warnings[0]


@pytest.mark.parametrize("ruin", [float("nan"), float("inf")])
def test_ruined_weights_are_named(ruin: float, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        generated(checkpoint(llama2(), tmp_path, ruin), "to be", [])


TEXTS = [
    "to be or not",
    "caf\u00e9 \u4e2d\u6587 \U0001f600!",
    "a true \ufffd, twice: \ufffd\ufffd",
    "<0x41>",
    "  the  end  ",
]


@pytest.mark.parametrize("make", [llama2, llama3, gemma, t5, bert])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_decoded_whole(make: Callable[[], Library], text: str) -> None:
    tokenizer = Tokenizer(make().to_str().encode(), "tokenizer")
    ids, prompt = tokenizer.encode(text), tokenizer.encode("to be")
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in ids]
    assert "".join([*pieces, stream.end()]) == tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


def test_a_true_replacement_character_stalls_nothing() -> None:
    tokenizer = Tokenizer(llama3().to_str().encode(), "tokenizer")
    stream = TextStream(tokenizer, [])
    pieces = [stream.add(token) for token in tokenizer.encode("\ufffd\ufffd\ufffd then")]
    assert "".join(pieces[:9]) == "\ufffd\ufffd"


def test_text_ends_before_a_stop_string() -> None:
    tokenizer = Tokenizer(llama3().to_str().encode(), "tokenizer")
    stream = TextStream(tokenizer, [], ["END", "stop here"])
    shown = ""
    for token in tokenizer.encode("an EN is no END of it"):
        shown += stream.add(token)
        if stream.has_stopped:
            break
    assert stream.has_stopped
    assert shown == "an EN is no "


def test_what_only_begins_a_stop_is_shown() -> None:
    tokenizer = Tokenizer(llama3().to_str().encode(), "tokenizer")
    stream = TextStream(tokenizer, [], ["END"])
    pieces = [stream.add(token) for token in tokenizer.encode("the EN")]
    assert "".join([*pieces, stream.end()]) == "the EN"


def translator(folder: Path, **special: object) -> Path:
    """A checkpoint of a T5 with random weights; ``special``: what its folder says of its tokens."""
    library, ids = t5(), {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    sizes = {"vocab_size": library.get_vocab_size(), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    T5ForConditionalGeneration(
        T5Config(**sizes, num_heads=2, feed_forward_proj="gated-gelu", **{**ids, **special})
    ).save_pretrained(folder / "hf")
    library.save(str(folder / "hf" / "tokenizer.json"))
    import_folder(folder / "hf", folder / "checkpoint")
    return folder / "checkpoint"


def test_a_decoders_text_stands_by_itself(tmp_path: Path) -> None:
    """Without the source, and as transformers decodes it: nothing stands before its first word."""
    path, tokenizer = translator(tmp_path), Tokenizer(t5().to_str().encode(), "tokenizer")
    source, limits = [*tokenizer.encode("to be"), 1], Limits(6, [1], tokenizer.vocab_size)
    steps = generate_batch(load_decoder(CheckpointReader(path)), [[0]], limits, Sampling(), sources=[source])
    expected = tokenizer.decode([token for (token,) in steps if token is not None])
    for beams in (None, BeamSearch(1)):  # one beam is greedy
        settings = TextSettings(6, beams=beams)
        assert "".join(generate_text(path, "to be", settings, warn=pytest.fail)) == expected
        assert [text.text for text in open_writer(path)[0].write([source], settings)] == [expected]


def test_a_source_begins_and_ends_as_trained(tmp_path: Path) -> None:
    bos, eod = Token(id=2, token="<unk>"), Token(id=1, token="</s>")
    writer, _ = open_writer(translator(tmp_path))
    assert writer.begin([7, 8]) == [7, 8, eod.id]
    assets = Assets(SpecialTokens(bos=bos, eod=eod, begins_with_bos=True), writer.assets.files)
    assert Writer(writer.model, writer.tokenizer, assets).begin([7, 8]) == [bos.id, 7, 8, eod.id]
    exported = Library.from_buffer(assets.between_borders().files["tokenizer.json"])
    text = writer.tokenizer.encode("to be")
    assert exported.encode("to be").ids == [bos.id, *text, eod.id]
    again = Tokenizer(assets.between_borders().files["tokenizer.json"], "tokenizer").with_borders("<unk>", "</s>")
    assert again == assets.between_borders().files["tokenizer.json"]
    ended = Library.from_buffer(writer.assets.between_borders().files["tokenizer.json"])
    assert ended.encode("to be").ids == [*text, eod.id]


def test_a_sources_ids_are_those_of_the_model(tmp_path: Path) -> None:
    writer, _ = open_writer(translator(tmp_path))
    with pytest.raises(ConfigError, match="A source has token ids outside of 0 to"):
        writer.write([[5, 500]], TextSettings(3))


def test_another_decoder_start_is_not_imported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="decoder_start_token_id is 5; only 0 can be imported, the id of <pad>"):
        translator(tmp_path, decoder_start_token_id=5)
