"""EleutherAI's lm-evaluation-harness on a checkpoint (extra ``megatrain[lm-eval]``), under the model name megatrain:

    python -m megatrain.tasks.harness run --model megatrain --model_args checkpoint=runs/tiny --tasks lambada_openai

From Python, ``lm_eval.simple_evaluate(model=HarnessModel("runs/tiny"), ...)``. Requests get the token ids that the
harness's own ``hf`` model gives them, from the checkpoint's tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import Progress

from megatrain.checkpoint.location import locate
from megatrain.errors import ConfigError, MegatrainError
from megatrain.inference.writer import TextSettings, open_writer
from megatrain.tasks.scoring import Request, score
from megatrain.terminal import printable

LONGEST_ANSWER = 256


@register_model("megatrain")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A checkpoint as the harness sees a model. ``checkpoint``: a checkpoint or run folder, or an address."""

    def __init__(self, checkpoint: str = "", batch_size: int | str | None = None, **ignored: Any) -> None:
        """``batch_size`` is ours to choose: batches are made by length."""
        super().__init__()
        if not checkpoint:
            raise ConfigError("The model needs its checkpoint: --model_args checkpoint=RUN.")
        self._writer, _ = open_writer(locate(checkpoint))
        self._prefix = [*self._writer.assets.prompt_ids]

    @property
    def eot_token_id(self) -> int:
        eod = self._writer.assets.special_tokens.eod
        if eod is None:
            raise ConfigError("The checkpoint names no token that ends a document, which the harness asks for.")
        return eod.id

    @property
    def prefix_token_id(self) -> int:
        bos = self._writer.assets.special_tokens.bos
        return self.eot_token_id if bos is None else bos.id

    @property
    def tokenizer_name(self) -> str:
        return self._writer.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        ids = self._writer.tokenizer.encode(string)
        begins = add_special_tokens is False or ids[:1] == self._prefix  # as a chat template begins
        return ids if begins else [*self._prefix, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise ConfigError("Under the harness megatrain begins no answers: leave out the task's gen_prefix.")
        return self._writer.chat_text(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The harness puts it down beside the results."""
        if isinstance(chat_template, str):
            raise ConfigError("Under the harness megatrain knows one chat template: give --apply_chat_template alone.")
        template = self._writer.template
        return template.source if chat_template and template is not None else ""

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **ignored: Any
    ) -> list[tuple[float, bool]]:
        longest = self._writer.model.config.max_position_embeddings + 1
        asked = []
        for _, context, continuation in requests:
            whole = (context + continuation)[-longest:]
            cut = max(len(whole) - len(continuation), 1)
            asked.append(Request(tuple(whole[:cut]), tuple(whole[cut:])))
        with Progress(disable=disable_tqdm, transient=True) as progress:
            bar = progress.add_task("megatrain", total=len(asked))
            found = score(self._writer.model, asked, lambda count: progress.advance(bar, count))
        return [(each.log_likelihood, each.is_greedy) for each in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        sums = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._writer.model.config.max_position_embeddings,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            sums.append(sum(likelihood for likelihood, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        grouped: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            asked = request.args[1]
            if asked.get("do_sample") or asked.get("num_beams", 1) > 1:
                raise ConfigError("Under the harness megatrain generates the likeliest tokens: set do_sample to false.")
            stops = asked.get("until") or []
            stops = (stops,) if isinstance(stops, str) else tuple(stops)
            grouped.setdefault((stops, asked.get("max_gen_toks", LONGEST_ANSWER)), []).append(number)
        texts = [""] * len(requests)
        with Progress(disable=disable_tqdm, transient=True) as progress:
            bar = progress.add_task("megatrain", total=len(requests))
            for (stops, most), numbers in grouped.items():
                prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
                settings = TextSettings(most, stops=stops)
                found = self._writer.write(prompts, settings, lambda count: progress.advance(bar, count))
                for number, text in zip(numbers, found, strict=True):
                    texts[number] = text.text
        return texts


def main() -> None:
    """The harness's own command line, where our errors end as in ours."""
    try:
        cli_evaluate()
    except MegatrainError as error:
        sys.stderr.write(printable(f"megatrain: {error}") + "\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
