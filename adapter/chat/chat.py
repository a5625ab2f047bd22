"""Talk with a base model or an adapter on it: `qwenlora chat runs/tiny`, `... --prompt 几点开门？`."""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from qwenlora.adapter.answers import Question, Sampling, check_text, context_length
from qwenlora.adapter.chat.conversation import STOPPED, Conversation, uses_thinking
from qwenlora.adapter.chat.question_files import answer_questions, check_lengths, check_output, read_questions
from qwenlora.adapter.chat.terminal import KEYS, describe_reply, piece_printer, talk
from qwenlora.adapter.compare.side_by_side import clean
from qwenlora.adapter.loading import LoadedModel, load, load_tokenizer, override_model
from qwenlora.adapter.subject import Subject
from qwenlora.configs.estimate import RESERVE
from qwenlora.trainer.model import loading, pretrained
from qwenlora.trainer.model.architecture import class_of

COLDEST = 0.01  # lowest temperature above 0; logits divided by much less overflow
INTERRUPTED = 130  # a shell's exit code for Ctrl-C


class ChatOptions(NamedTuple):
    """The command's options, but for sampling. thinking: None for the default, off."""

    prompt: str | None = None
    input_file: Path | None = None
    output_file: Path | None = None
    system: str | None = None
    thinking: bool | None = None
    quantization: str = "auto"
    dtype: str = "auto"


def chat(subject: Subject, sampling: Sampling, options: ChatOptions | None = None) -> int:
    """Answer a prompt, file, piped text or person; return the exit code. Raises: ValueError for bad input."""
    options = options or ChatOptions()
    _check_options(options)
    _check_sampling(sampling)
    override_model(subject.config, options.dtype, _requested(options.quantization))
    questions = _read_input(subject, options)
    if not questions and options.prompt is None:
        options = options._replace(prompt=_read_stdin())
        if options.prompt is None and not sys.stdout.isatty():
            raise ValueError("standard output is no terminal to talk in; give --prompt TEXT, or --input FILE")
    tokenizer = load_tokenizer(subject)
    thinking = uses_thinking(tokenizer, options.thinking)
    if questions:
        limit = context_length(pretrained.load_config_of(subject.config, subject.base))
        check_lengths(questions, tokenizer, limit, thinking=thinking)
    screen = Console(markup=False, highlight=False, emoji=False)
    notes = Console(markup=False, highlight=False, emoji=False, stderr=True)
    try:
        with_a_person = not questions and options.prompt is None
        with (screen if with_a_person else notes).status(
            clean(f"loading {subject.label}"), spinner_style="dim"
        ):
            model, _ = _load(subject, options, tokenizer)
        if questions:
            output = options.output_file
            answer_questions(model, tokenizer, questions, sampling, output, thinking=thinking)
            if output:
                print(f"{len(questions):,} answers are in {output}")
            return 0
        system = options.system or None
        conversation = Conversation(model, tokenizer, sampling, system=system, thinking=thinking)
        if options.prompt is not None:
            return _answer_prompt(conversation, options.prompt, screen, notes)
        screen.print(clean(f"{_introduction(subject, model)}\n{KEYS}"), style="dim")
        return talk(conversation, screen)
    except KeyboardInterrupt:
        return INTERRUPTED


def _answer_prompt(conversation: Conversation, prompt: str, screen: Console, notes: Console) -> int:
    reply = conversation.ask(prompt, piece_printer(screen, notes))
    print()
    if reply.cut:
        notes.print(describe_reply(reply), style="dim")
    return INTERRUPTED if reply.cut == STOPPED else 0


def _check_options(options: ChatOptions) -> None:
    """Raise ValueError for options that cannot be followed, or not together."""
    if options.prompt is not None and options.input_file:
        raise ValueError("--prompt and --input both give questions; leave one out")
    if options.output_file:
        if not options.input_file:
            raise ValueError(
                f"--output {options.output_file} goes with --input FILE; a prompt's answer is printed"
            )
        check_output(options.output_file)
    if options.prompt is not None:
        check_text(options.prompt, "--prompt")
    if options.system:
        check_text(options.system, "--system")


def _check_sampling(sampling: Sampling) -> None:
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


def _read_input(subject: Subject, options: ChatOptions) -> list[Question]:
    """Return the questions of --input; [] without it."""
    if not options.input_file:
        return []
    return read_questions(options.input_file, subject.config.data, options.system)


def _read_stdin() -> str | None:
    """Return the text that is piped in; None at a terminal."""
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


def _requested(quantization: str) -> str | None:
    return None if quantization == "auto" else quantization


def _load(subject: Subject, options: ChatOptions, tokenizer: Any) -> LoadedModel:
    quantization = _requested(options.quantization) or _fitting_quantization(subject, options.dtype)
    try:
        return load(subject, dtype=options.dtype, quantization=quantization, tokenizer=tokenizer)
    except torch.OutOfMemoryError:
        less = "" if quantization == "nf4" else "try --quantization nf4, or "
        raise ValueError(
            f"{subject.label} does not fit the GPU's memory; {less}free some (nvidia-smi)"
        ) from None


def _fitting_quantization(subject: Subject, dtype: str) -> str:
    """Return nf4 when there is a GPU whose free memory is too small for the base's weights, else none."""
    if not torch.cuda.is_available():
        return "none"
    config = override_model(subject.config, dtype, "none")
    model_config = pretrained.load_config_of(config, subject.base)
    if getattr(model_config, "quantization_config", None):
        return "none"  # its files are quantised already
    with torch.device("meta"):
        model = class_of(model_config).from_config(
            model_config,
            dtype=loading.pick_dtype(config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
        )
    weights = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    free, _ = torch.cuda.mem_get_info()
    return "none" if weights + RESERVE <= free else "nf4"


def _introduction(subject: Subject, model: object) -> str:
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    method = str(getattr(quantization, "quant_method", "")).rpartition(".")[2] if quantization else ""
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    kind = f"an adapter of {Path(subject.base).name}" if subject.adapter else "a model"
    return f"{subject.label}, {kind}: {', '.join(filter(None, [dtype, method, f'on {place}']))}."
