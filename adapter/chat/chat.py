"""Talk with a base model or with what was made of it: `qwenlora chat runs/tiny`, `... --prompt 几点开门？`.

Here is what is asked for and how the model is loaded. conversation.py is the model's side, terminal.py the
screen's, batch.py answers files.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from qwenlora.adapter.answers import Sampling, check_text, context_of
from qwenlora.adapter.chat import question_files as batch
from qwenlora.adapter.chat.conversation import STOPPED, Conversation, thinks
from qwenlora.adapter.chat.terminal import KEYS, said_of, shower, talk
from qwenlora.adapter.compare.side_by_side import clean
from qwenlora.adapter.loading import Loaded, as_asked, load, tokenizer_of
from qwenlora.adapter.subject import Subject
from qwenlora.configs.estimate import RESERVE
from qwenlora.trainer.model import base as models

COLDEST = 0.01  # what logits are divided by; much less, and they overflow
INTERRUPTED = 130  # as shells say of Ctrl-C


def chat(
    subject: Subject,
    sampling: Sampling,
    *,
    prompt: str | None = None,
    input_file: Path | None = None,
    output_file: Path | None = None,
    system: str | None = None,
    thinking: bool | None = None,
    quantization: str = "auto",
    dtype: str = "auto",
) -> int:
    """Answer a prompt, a file, standard input when it is no terminal, or a person; return the exit code.

    The arguments are the command's options. Raises: ValueError for what cannot be read, loaded, or done.
    """
    _check(sampling, prompt, input_file, output_file, system)
    as_asked(subject.config, dtype, None if quantization == "auto" else quantization)
    asked = batch.read(input_file, subject.config.data, system) if input_file else []
    if not asked and prompt is None and (prompt := _from_stdin()) is None and not sys.stdout.isatty():
        raise ValueError("standard output is no terminal to talk in; give --prompt TEXT, or --input FILE")
    tokenizer = tokenizer_of(subject)
    thinking = thinks(tokenizer, thinking)
    if asked:
        limit = context_of(models.load_config_of(subject.config, subject.base))
        batch.check_lengths(asked, tokenizer, limit, thinking=thinking)
    screen = Console(markup=False, highlight=False, emoji=False)
    notes = Console(markup=False, highlight=False, emoji=False, stderr=True)
    try:
        alone = not asked and prompt is None
        with (screen if alone else notes).status(clean(f"loading {subject.label}"), spinner_style="dim"):
            model, _ = _loaded(subject, dtype, quantization, tokenizer)
        if asked:
            batch.answer(model, tokenizer, asked, sampling, output_file, thinking=thinking)
            if output_file:
                print(f"{len(asked):,} answers are in {output_file}")
            return 0
        conversation = Conversation(model, tokenizer, sampling, system=system or None, thinking=thinking)
        if prompt is not None:
            reply = conversation.ask(prompt, shower(screen, notes))
            print()
            if reply.cut:
                notes.print(said_of(reply), style="dim")
            return INTERRUPTED if reply.cut == STOPPED else 0
        screen.print(clean(f"{_introduction(subject, model)}\n{KEYS}"), style="dim")
        return talk(conversation, screen)
    except KeyboardInterrupt:
        return INTERRUPTED


def _check(
    sampling: Sampling,
    prompt: str | None,
    input_file: Path | None,
    output_file: Path | None,
    system: str | None,
) -> None:
    """Raise ValueError for options that cannot be followed, or not together."""
    if prompt is not None and input_file:
        raise ValueError("--prompt and --input both say what is asked; leave one out")
    if output_file:
        if not input_file:
            raise ValueError(f"--output {output_file} goes with --input FILE; a prompt's answer is printed")
        batch.check_output(output_file)
    if prompt is not None:
        check_text(prompt, "--prompt")
    if system:
        check_text(system, "--system")
    if sampling.temperature and not COLDEST <= sampling.temperature < math.inf:
        raise ValueError(
            f"--temperature {sampling.temperature}: expected 0 (the likeliest token), or {COLDEST} or more"
        )
    if math.isnan(sampling.top_p):
        raise ValueError(f"--top-p {sampling.top_p}: expected a number")
    if not 0 < sampling.repetition_penalty < math.inf:
        raise ValueError(
            f"--repetition-penalty {sampling.repetition_penalty}: expected above 0; 1 changes nothing"
        )
    if sampling.seed is not None and not 0 <= sampling.seed < 2**32:
        raise ValueError(f"--seed {sampling.seed}: expected 0 to {2**32 - 1}")


def _from_stdin() -> str | None:
    """Return what is piped in; None when a person is there."""
    if sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"standard input is not UTF-8 text at byte {error.start:,}; convert it: iconv"
        ) from None
    if not text:
        raise ValueError(
            "standard input is no terminal, and empty; pipe a question in, or give --prompt TEXT"
        )
    check_text(text, "standard input")
    return text


def _loaded(subject: Subject, dtype: str, quantization: str, tokenizer: Any) -> Loaded:
    quantization = _fitting(subject, dtype) if quantization == "auto" else quantization
    try:
        return load(subject, dtype=dtype, quantization=quantization, tokenizer=tokenizer)
    except torch.OutOfMemoryError:
        less = "" if quantization == "nf4" else "try --quantization nf4, or "
        raise ValueError(
            f"{subject.label} does not fit the GPU's memory; {less}free some (nvidia-smi)"
        ) from None


def _fitting(subject: Subject, dtype: str) -> str:
    """Return nf4 when there is a GPU, and the base's weights do not fit its free memory as they are; else
    none."""
    if not torch.cuda.is_available():
        return "none"
    config = as_asked(subject.config, dtype, "none")
    described = models.load_config_of(config, subject.base)
    if getattr(described, "quantization_config", None):
        return "none"  # it is quantised already, in a way of its own
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            described,
            dtype=models.pick_dtype(config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
        )
    weights = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    free, _ = torch.cuda.mem_get_info()
    return "none" if weights + RESERVE <= free else "nf4"


def _introduction(subject: Subject, model: object) -> str:
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    config = getattr(model, "config", None)
    stored = getattr(config, "quantization_config", None)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    what = f"an adapter of {Path(subject.base).name}" if subject.adapter else "a model"
    facts = [
        dtype,
        str(getattr(stored, "quant_method", "")).rpartition(".")[2] if stored else "",
        f"on {where}",
    ]
    return f"{subject.label}, {what}: {', '.join(fact for fact in facts if fact)}."
