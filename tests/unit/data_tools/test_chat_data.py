"""Conversations into datasets: the ids and masks of transformers and trl, and what is left out and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from data_samples import RunCommand
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_tools import conversations
from data_tools.supervised import overlapping
from megatrain.data import Dataset, open_dataset
from tests.tokenizer_samples import LLAMA3_WORDS, byte_level, llama2

TRL = Path(trl.__file__).parent / "chat_templates"
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""  # of SmolLM2
ZEPHYR = """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif %}{% endfor %}"""
NO_PROMPT = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"""
FORGETFUL = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}
{%- else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

Turns = list[tuple[str, str]]
CONVERSATIONS: dict[str, Turns] = {
    "one turn": [("user", "What is 2+2?"), ("assistant", "Four.")],
    "several turns": [
        ("user", "a b"),
        ("assistant", "the the"),
        ("user", "e"),
        ("assistant", "stra\u00dfe \u65e5\u672c"),
    ],
    "system": [("system", "Be brief."), ("user", "hi"), ("assistant", "yo")],
    "white space": [("user", "hi "), ("assistant", " \nyo "), ("user", "\n"), ("assistant", "\n\nyo\n")],
    "an empty answer": [("user", "hi"), ("assistant", ""), ("user", "again"), ("assistant", "yo")],
    "ends with a question": [("user", "hi"), ("assistant", "yo"), ("user", "bye")],
    "spells its header": [("user", "assistant\n"), ("assistant", "assistant\nassistant")],
}


def messages(turns: Turns) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def im_tokenizer() -> Tokenizer:
    thinking = [AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")]
    return byte_level(LLAMA3_WORDS, thinking, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def save(folder: Path, tokenizer: Tokenizer, template: str, **tokens: str) -> Any:
    """A tokenizer folder; the tokenizer that transformers reads from it."""
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    made.chat_template = template
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def write(path: Path, conversations: list[Turns] | list[list[dict[str, Any]]]) -> Path:
    rows = [each if isinstance(each[0], dict) else messages(each) for each in conversations]  # type: ignore[arg-type]
    path.write_bytes(b"".join(orjson.dumps({"messages": row}) + b"\n" for row in rows))
    return path


Tokenize = Callable[..., tuple[Dataset, str]]


@pytest.fixture
def tokenize(tmp_path: Path, run_command: RunCommand) -> Tokenize:
    """Runs `tokenize --chat` on conversations with the tokenizer folder `tok`; the dataset, and what was said."""

    def run(conversations: Any, *options: object, eod: str = "<|endoftext|>", out: str = "out") -> tuple[Dataset, str]:
        source = conversations if isinstance(conversations, Path) else write(tmp_path / "in.jsonl", conversations)
        command = ("tokenize", source, "--tokenizer", tmp_path / "tok", "--out", tmp_path / out, "--eod-token", eod)
        code, shown, said = run_command(*command, *options, "--workers", 1)
        assert code == 0, said
        code, _, problem = run_command("verify", tmp_path / out, "--workers", 1)
        assert code == 0, problem
        return open_dataset(tmp_path / out), shown + said

    return run


def scored_texts(dataset: Dataset, k: int = 0) -> list[str]:
    """What is scored of a document, run by run."""
    begin, end = dataset.document_range(k)
    bounds = np.flatnonzero(np.diff(dataset.scored(begin, end - begin), prepend=False, append=False))
    tokens = dataset.document(k).tolist()
    return [dataset.tokenizer.decode(tokens[a:b]) for a, b in bounds.reshape(-1, 2).tolist()]


def without_line_end(ids: list[int], mask: list[int], line_end: int) -> list[int]:
    """A mask of trl's training templates, which score the line end behind an answer as well: without it."""
    ends = [n for n in range(1, len(mask)) if mask[n] and mask[n - 1] and (n + 1 == len(mask) or not mask[n + 1])]
    return [0 if n in ends and ids[n] == line_end else value for n, value in enumerate(mask)]


def test_ids_and_masks_are_those_of_transformers(tmp_path: Path, tokenize: Tokenize) -> None:
    """With trl's own templates for training as the reference of plain ones, whose answers are found by message."""
    for name in ("llama3", "gemma", "qwen3_instruct_2507", "cohere", "lfm2"):
        plain, training = ((TRL / f"{name}{suffix}.jinja").read_text() for suffix in ("", "_training"))
        special = sorted(set(re.findall(r"<\|\w+\|>|<\w+_of_turn>|<\|[A-Z_]+\|>", plain)) | {"<pad>", "<bos>", "<eos>"})
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
        reference = save(tmp_path / f"{name}-reference", byte_level(LLAMA3_WORDS, [], special), training, **tokens)
        save(tmp_path / "tok", byte_level(LLAMA3_WORDS, [], special), plain, **tokens)
        kept = [turns for key, turns in CONVERSATIONS.items() if name != "gemma" or key != "system"]
        dataset, _ = tokenize(kept, "--chat", eod="<pad>", out=name)
        line_end = reference.encode("\n", add_special_tokens=False)[0]
        for k, turns in enumerate(kept):
            how = {"return_assistant_tokens_mask": True, "return_dict": True}
            expected = reference.apply_chat_template(messages(turns), tokenize=True, **how)
            begin, end = dataset.document_range(k)
            assert dataset.document(k).tolist() == [*expected["input_ids"], reference.convert_tokens_to_ids("<pad>")]
            mask = without_line_end(expected["input_ids"], expected["assistant_masks"], line_end)
            assert dataset.scored(begin, end - begin).tolist() == [*map(bool, mask), False], (name, turns)


def test_marked_templates_are_taken_at_their_word(tmp_path: Path, tokenize: Tokenize) -> None:
    """By transformers' own mask, also where earlier turns are rewritten."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(LLAMA3_WORDS, ["<think>", "</think>"], special)
    reference = save(tmp_path / "tok", tokenizer, (TRL / "qwen3_training.jinja").read_text())
    last, _ = tokenize([CONVERSATIONS["several turns"]], "--chat", "--loss", "last", out="last")
    assert scored_texts(last) == ["<think>\n\n</think>\n\nstra\u00dfe \u65e5\u672c<|im_end|>\n"]
    dataset, said = tokenize(list(CONVERSATIONS.values()), "--chat")
    assert "split into turns" not in said
    for k, turns in enumerate(CONVERSATIONS.values()):
        how = {"return_assistant_tokens_mask": True, "return_dict": True}
        expected = reference.apply_chat_template(messages(turns), tokenize=True, **how)
        begin, end = dataset.document_range(k)
        assert dataset.document(k).tolist()[:-1] == expected["input_ids"]
        assert dataset.scored(begin, end - begin).tolist()[:-1] == list(map(bool, expected["assistant_masks"]))


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>"])
def test_scored_closers_are_as_many_as_scored_turns(tmp_path: Path, tokenize: Tokenize, pad: str) -> None:
    """Whether the token that ends a turn also pads, or is another one than eos."""
    save(tmp_path / "tok", im_tokenizer(), CHATML, eos_token=pad, pad_token=pad)
    dataset, said = tokenize([CONVERSATIONS["several turns"]], "--chat")
    assert scored_texts(dataset) == ["the the<|im_end|>", "stra\u00dfe \u65e5\u672c<|im_end|>"]
    assert dataset.document(0)[-1] == dataset.eod_id
    assert "the template writes '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM" in said


def test_answers_are_found_in_sentencepiece_text(tmp_path: Path, tokenize: Tokenize) -> None:
    """The template's own space before an answer is in its first token, as in transformers' masks."""
    reference = save(tmp_path / "tok", llama2(), MISTRAL, bos_token="<s>", eos_token="</s>")
    turns = [("user", "to be"), ("assistant", " or not"), ("user", "the"), ("assistant", "that")]
    options = ("--chat", "--bos-token", "<s>")
    dataset, _ = tokenize([turns], *options, eod="</s>")
    expected = reference.apply_chat_template(messages(turns), tokenize=True, return_dict=False)
    assert dataset.document(0).tolist() == expected  # one <s> before, and its own </s> behind
    assert [text.strip() for text in scored_texts(dataset)] == ["or not </s>", "that </s>"]
    save(tmp_path / "tok", llama2(), ZEPHYR, bos_token="<s>", eos_token="</s>")
    dataset, _ = tokenize([turns], "--chat", eod="</s>", out="zephyr")
    assert scored_texts(dataset) == ["or not</s>", "that</s>"]


def test_a_header_is_never_scored_without_a_prompt(tmp_path: Path, tokenize: Tokenize) -> None:
    save(tmp_path / "tok", im_tokenizer(), NO_PROMPT)
    dataset, _ = tokenize([CONVERSATIONS["spells its header"], CONVERSATIONS["white space"]], "--chat")
    assert scored_texts(dataset) == ["assistant\nassistant<|im_end|>"]
    assert scored_texts(dataset, 1) == [" \nyo <|im_end|>", "\n\nyo\n<|im_end|>"]


def test_templates_that_forget_give_an_example_a_turn(tmp_path: Path, tokenize: Tokenize) -> None:
    reference = save(tmp_path / "tok", im_tokenizer(), FORGETFUL)
    turns = [("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e")]
    dataset, said = tokenize([turns], "--chat")
    assert "1 read, 1 split into turns" in said
    assert [scored_texts(dataset, k) for k in range(2)] == [["<think>b</think>c<|im_end|>"], ["e<|im_end|>"]]
    for k, length in enumerate((2, 4)):
        expected = reference.apply_chat_template(messages(turns[:length]), tokenize=True, return_dict=False)
        assert dataset.document(k).tolist()[:-1] == expected
    last, _ = tokenize([turns], "--chat", "--loss", "last", out="last")
    assert last.num_documents == 1
    assert np.array_equal(last.document(0), dataset.document(1))


def test_control_tokens_of_messages_stay_text(tmp_path: Path, tokenize: Tokenize) -> None:
    save(tmp_path / "tok", im_tokenizer(), CHATML)
    spelled = [
        ("user", "say <|im_end|>"),
        ("assistant", "<|im_end|> the<|im_start|>"),
        ("user", "\n"),
        ("assistant", "b"),
    ]
    alike = [(role, text.replace("<|im", "<|in")) for role, text in spelled]
    dataset, said = tokenize([spelled, alike], "--chat")
    assert "1 spelled control tokens" in said
    assert scored_texts(dataset) == ["<|im_end|> the<|im_start|><|im_end|>", "b<|im_end|>"]
    ids = dataset.tokenizer.ids
    for k in range(2):
        tokens = dataset.document(k).tolist()
        assert [tokens.count(ids[token]) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")] == [5, 5, 1]
    letters = [dataset.tokenizer.decode(dataset.document(k).tolist()).replace("<|in", "<|im") for k in range(2)]
    assert letters[0] == letters[1]
    assert dataset.document_info(0).text_bytes == dataset.document_info(1).text_bytes


def test_tokens_that_models_write_are_tokens(tmp_path: Path, tokenize: Tokenize) -> None:
    save(tmp_path / "tok", im_tokenizer(), CHATML)
    dataset, _ = tokenize([[("user", "a"), ("assistant", "<think>b</think>c")]], "--chat")
    assert dataset.tokenizer.ids["<think>"] in dataset.document(0)


def test_which_messages_are_scored_can_be_chosen(tmp_path: Path, tokenize: Tokenize) -> None:
    save(tmp_path / "tok", im_tokenizer(), CHATML)
    talk = messages([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    weighed = [talk[0], {**talk[1], "weight": 0}, {**talk[2], "train": True}, talk[3]]
    wanted = {
        ("--loss", "all"): ["b<|im_end|>", "d<|im_end|>"],
        ("--loss", "last"): ["d<|im_end|>"],
        ("--train-on-roles", "user"): ["a<|im_end|>", "c<|im_end|>"],
        ("--train-on-roles", "user", "--train-on-roles", "assistant"): [f"{x}<|im_end|>" for x in "abcd"],
    }
    digests = set()
    for number, (options, texts) in enumerate(wanted.items()):
        dataset, _ = tokenize([talk], "--chat", *options, out=f"out{number}")
        assert scored_texts(dataset) == texts
        digests.add(dataset.digest)
    assert len(digests) == len(wanted)
    assert scored_texts(tokenize([weighed], "--chat", out="weighed")[0]) == ["c<|im_end|>", "d<|im_end|>"]


def test_tools_and_their_calls_are_rendered(tmp_path: Path, tokenize: Tokenize) -> None:
    reference = save(tmp_path / "tok", im_tokenizer(), (TRL / "qwen2_5.jinja").read_text())
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    rows = [{"messages": talk, "tools": tools}, {"messages": talk, "tools": orjson.dumps(tools).decode()}]
    (tmp_path / "in.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    dataset, _ = tokenize(tmp_path / "in.jsonl", "--chat")
    expected = reference.apply_chat_template(talk, tools=tools, tokenize=True, return_dict=False)
    for k in range(2):
        assert dataset.document(k).tolist()[:-1] == expected
        first, second = scored_texts(dataset, k)
        assert first.startswith("<tool_call>") or '"add"' in first
        assert second == "2.<|im_end|>"


def test_every_format_gives_the_same_conversations(tmp_path: Path, tokenize: Tokenize) -> None:
    save(tmp_path / "tok", im_tokenizer(), CHATML)
    rows = [{"id": key, "messages": messages(turns)} for key, turns in CONVERSATIONS.items()]
    rows[0]["messages"][1]["weight"] = 1  # which tables fill up with nulls
    (tmp_path / "a.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    (tmp_path / "a.json").write_bytes(orjson.dumps(rows))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    names = ("a.jsonl", "a.json", "a.parquet", "a.arrow")
    assert len({tokenize(tmp_path / name, "--chat", out=f"{name}.out")[0].digest for name in names}) == 1


def test_conversations_left_out_are_listed(tmp_path: Path, tokenize: Tokenize) -> None:
    save(tmp_path / "tok", llama2(), MISTRAL, bos_token="<s>", eos_token="</s>")
    talks = [
        [("user", "to be"), ("assistant", "or not")],
        [("user", "to be")],
        [("user", "to be"), ("assistant", "")],
        [("user", "to be"), ("user", "or not"), ("assistant", "the")],
    ]
    dataset, said = tokenize(talks, "--chat", eod="</s>")
    assert dataset.num_documents == 1
    assert dataset.manifest.examples == {"read": 4, "no_answer": 2, "rejected": 1}
    listed = [orjson.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_bytes().splitlines()]
    assert [entry["row"] for entry in listed] == [1, 2, 3]
    assert "roles must alternate" in listed[2]["problem"]
    assert "3 rows were left out" in said


def test_records_that_make_no_sense_are_left_out(
    tmp_path: Path, tokenize: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    save(tmp_path / "tok", im_tokenizer(), "{% for message in messages %}" + turn + "{% endfor %}")
    monkeypatch.setattr(conversations, "MAX_MESSAGES_RENDERED", 9)
    talk = messages([("user", "a"), ("assistant", "b")])
    parts = [{"type": "text", "text": "a"}]
    rows: dict[str, dict[str, Any]] = {
        "": {"messages": talk},
        "no message that is to be scored": {"messages": []},
        "no list of JSON schemas: 5": {"messages": talk, "tools": 5},
        "no list of JSON schemas: [1]": {"messages": talk, "tools": "[1]"},
        "tools are no JSON": {"messages": talk, "tools": "f(x)"},
        "weight of message 1 is 0.5": {"messages": [talk[0], {**talk[1], "weight": 0.5}]},
        "does not know content in parts": {"messages": [{"role": "user", "content": parts}, talk[1]]},
        "too long to find 3 answers in 6 messages": {"messages": talk * 3},
    }
    (tmp_path / "in.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows.values()))
    dataset, _ = tokenize(tmp_path / "in.jsonl", "--chat")
    assert dataset.num_documents == 1
    listed = [orjson.loads(line)["problem"] for line in (tmp_path / "out" / "skipped.jsonl").read_bytes().splitlines()]
    assert [words for words, problem in zip([*rows][1:], listed, strict=True) if words not in problem] == []


def test_answers_in_parts_are_found(tmp_path: Path, tokenize: Tokenize) -> None:
    parts = "{% for part in message.content %}{{ part.text }}{% endfor %}"
    whole = "{% for message in messages %}<|im_start|>{{ message.role }}\n" + parts + "<|im_end|>\n{% endfor %}"
    save(tmp_path / "tok", im_tokenizer(), whole)
    talk = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a"), ("assistant", "b"))
    ]
    assert scored_texts(tokenize([talk], "--chat")[0]) == ["b<|im_end|>"]


def test_a_long_conversation_ends_with_a_whole_answer(tmp_path: Path, tokenize: Tokenize) -> None:
    save(tmp_path / "tok", im_tokenizer(), NO_PROMPT)
    talks = [
        [("user", "a"), ("assistant", "b" * 20), ("user", "c"), ("assistant", "d" * 200)],
        [("user", "a"), ("assistant", "b"), ("user", "c" * 200)],
        [("user", "a" * 200), ("assistant", "b")],
        [("user", "a"), ("assistant", "b")],
    ]
    whole, _ = tokenize(talks, "--chat")
    dataset, said = tokenize(talks, "--chat", "--max-tokens", 100, out="cut")
    assert "1 cut answers, 1 cut prompts" in said
    assert [scored_texts(dataset, k) for k in range(3)] == [["b" * 20 + "<|im_end|>"], *[["b<|im_end|>"]] * 2]
    counts = dataset.manifest.examples or {}
    assert counts["no_answer_left"] == 1
    assert dataset.num_tokens + counts["dropped_tokens"] == whole.num_tokens
    for k in range(3):
        tokens = dataset.document(k)
        assert tokens[-1] == dataset.eod_id
        end = dataset.document_range(k)[1]
        assert not dataset.scored(end - 1, 1)  # the end is not the model's
        assert dataset.document_info(k).text_bytes == len(dataset.tokenizer.decode(tokens[:-1].tolist()))
    exact = len(whole.document(3))
    fitting, _ = tokenize(talks[3:], "--chat", "--max-tokens", exact, out="fits")
    assert np.array_equal(fitting.document(0), whole.document(3))


def test_the_template_travels_with_the_dataset(tmp_path: Path, tokenize: Tokenize, run_command: RunCommand) -> None:
    clock = "{{ strftime_now('%Y') }}" + CHATML
    save(tmp_path / "tok", im_tokenizer(), clock, eos_token="<|im_end|>")
    talks = [[("user", str(number)), ("assistant", str(-number))] for number in range(40)]
    dataset, _ = tokenize(talks, "--chat", "--chat-date", "2031-05-06")
    assert dataset.tokenizer.decode(dataset.document(0).tolist()).startswith("2031<|im_start|>")
    assert dataset.manifest.options["chat_date"] == "2031-05-06"
    again, _ = tokenize(talks, "--chat", out="again")
    assert dataset.digest != again.digest
    for name, content in dataset.template_files().items():
        assert (tmp_path / "tok" / name).read_bytes() == content
    assert {"chat_template.jinja", "tokenizer_config.json"} <= dataset.template_files().keys()
    (tmp_path / "out" / "chat_template.jinja").write_text("other")
    code, _, said = run_command("verify", tmp_path / "out", "--workers", 1)
    assert code == 3
    assert "chat_template.jinja: its checksum" in said
    command = ("split", tmp_path / "again", "--validation", "30%", "--out", tmp_path / "split", "--method", "exact")
    assert run_command(*command, "--workers", 1)[0] == 0
    sides = [open_dataset(tmp_path / "split" / side) for side in ("train", "validation")]
    assert sum(side.manifest.num_scored or 0 for side in sides) == again.manifest.num_scored
    assert all(run_command("verify", side.path, "--workers", 1)[0] == 0 for side in sides)


def test_one_document_is_shown_token_by_token(tmp_path: Path, tokenize: Tokenize, run_command: RunCommand) -> None:
    save(tmp_path / "tok", im_tokenizer(), NO_PROMPT)
    dataset, _ = tokenize([[("user", "a\u001b"), ("assistant", "the the\n")]], "--chat")
    code, shown, _ = run_command("inspect", tmp_path / "out", "--document", 0)
    assert code == 0
    assert "a|\\u001b|<|im_end|>|\\n\n" in shown
    assert "\u27e6the| the|\\n\n<|im_end|>\u27e7\\n\n<|endoftext|>\n" in shown
    assert f"scored tokens        4 ({400 / dataset.num_tokens:.1f}%)" in shown
    code, shown, _ = run_command("inspect", tmp_path / "out", "--document", 0, "--json")
    described = orjson.loads(shown)
    assert described["scored_tokens"] == 4
    assert described["document"]["scored"] == dataset.scored(0, dataset.num_tokens).tolist()


WRONG = {
    "a typo in the key": ("--chat", "--messages-key", "talk", 3, "no key 'talk'"),
    "what is no conversation": ("--chat", "--messages-key", "text", 3, "should be a list of messages with their roles"),
    "options without --chat": ("--loss", "last", 2, "--loss would do nothing"),
    "half a pair": ("--prompt-key", "messages", 2, "belong together"),
    "both kinds": ("--chat", "--prompt-key", "a", 2, "give one of them"),
    "a limit on plain text": ("--max-tokens", 9, 2, "--max-tokens would do nothing"),
    "a token that no prompt has": ("--chat", "--bos-token", "<think>", 2, "the chat template does not begin with it"),
    "no date": ("--chat", "--chat-date", "today", 2, "is no date"),
    "nothing left": ("--chat", "--train-on-roles", "nobody", 3, "No answer of the input is left to be scored"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_told(tmp_path: Path, run_command: RunCommand, case: str) -> None:
    save(tmp_path / "tok", im_tokenizer(), CHATML)
    row = {"messages": messages(CONVERSATIONS["one turn"]), "text": [{"content": "a"}]}
    (source := tmp_path / "in.jsonl").write_bytes(orjson.dumps(row))
    *options, code, message = WRONG[case]
    command = ("tokenize", source, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "out", "--workers", 1)
    found, _, said = run_command(*command, *options)
    assert found == code
    assert message in said


def test_an_endless_template_stops_the_command(tmp_path: Path, run_command: RunCommand) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}"
    save(tmp_path / "tok", im_tokenizer(), loop)
    source = write(tmp_path / "in.jsonl", [CONVERSATIONS["one turn"]])
    command = ("tokenize", source, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "out", "--workers", 1, "--chat")
    code, _, said = run_command(*command)
    assert code == 2
    assert "The chat template does not end" in said


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.lists(st.integers(1, 5), max_size=8))
@settings(deadline=None)
def test_a_token_counts_if_one_character_does(sizes: list[int], gaps: list[int]) -> None:
    """Of tokens end to end, some of them empty, and any spans."""
    ends = np.cumsum(sizes)
    tokens = np.stack([ends - sizes, ends], axis=1)
    bounds = np.cumsum(gaps)[: len(gaps) // 2 * 2].reshape(-1, 2).tolist()
    scored = {position for begin, end in bounds for position in range(begin, end)}
    expected = [not scored.isdisjoint(range(begin, max(end, begin + 1))) for begin, end in tokens.tolist()]
    assert overlapping(tokens, bounds).tolist() == expected
