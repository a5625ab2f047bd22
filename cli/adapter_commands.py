"""The commands that load a model: verify, merge, chat, compare, export, convert-qwen1."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwenlora.adapter.deferred import Deferred
from qwenlora.cli.arguments import run_argument

if TYPE_CHECKING:
    from qwenlora.adapter import answers
    from qwenlora.adapter import subject as finding
    from qwenlora.adapter import verify as verifying
    from qwenlora.adapter.chat import chat as chatting
    from qwenlora.adapter.compare import compare as comparing
    from qwenlora.adapter.compare import questions
    from qwenlora.adapter.merge import merge as merging
    from qwenlora.adapter.publish import export as exporting
    from qwenlora.adapter.publish import push as pushing
    from qwenlora.adapter.qwen1 import convert
else:
    answers = Deferred("qwenlora.adapter.answers")
    finding = Deferred("qwenlora.adapter.subject")
    verifying = Deferred("qwenlora.adapter.verify")
    chatting = Deferred("qwenlora.adapter.chat.chat")
    comparing = Deferred("qwenlora.adapter.compare.compare")
    questions = Deferred("qwenlora.adapter.compare.questions")
    merging = Deferred("qwenlora.adapter.merge.merge")
    exporting = Deferred("qwenlora.adapter.publish.export")
    pushing = Deferred("qwenlora.adapter.publish.push")
    convert = Deferred("qwenlora.adapter.qwen1.convert")

Subject = Annotated[
    str, run_argument("RUN|ADAPTER|MODEL", "A run folder, a checkpoint, an adapter, or a model.")
]
Adapter = Annotated[str, run_argument("ADAPTER", "An adapter's folder, a run's, or a checkpoint's.")]
Base = Annotated[
    str | None,
    typer.Option(help="The base model, where it is not where the adapter says: a folder or hub name."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base.")
]


def verify(adapter: Adapter, base: Base = None, trust_remote_code: TrustRemoteCode = False) -> int:
    """Check that an adapter is whole, fits its base, and holds something; say which base it needs.

    Example: qwenlora verify runs/my
    """
    return verifying.print_check(finding.find(adapter, base=base, trust_remote_code=trust_remote_code))


def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    more: Annotated[
        list[str] | None, typer.Option("--adapter", help="One more adapter; may be given again.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of several adapters: their weights, as 0.7,0.3. Default: 1 each.")
    ] = None,
    combine: Annotated[
        str,
        typer.Option(
            help="Of several adapters: how peft combines them (cat: the exact sum, linear, svd, ties ...)."
        ),
    ] = "cat",
    base: Base = None,
    dtype: Annotated[
        str, typer.Option(help="Of the merged weights: auto (as the base's files), bf16, fp16 or fp32.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file with a prompt a line, to compare merged and unmerged with."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> int:
    """Make one model of a base and an adapter, file by file, and compare its logits with theirs.

    Example: qwenlora merge runs/my merged/my
    """
    subjects = [
        finding.find(name, base=base, trust_remote_code=trust_remote_code)
        for name in (adapter, *(more or []))
    ]
    return merging.merge(
        subjects, out, merging.MergeOptions(weights, combine, dtype, max_shard_size, prompts)
    )


def chat(
    subject: Subject,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this, and leave.")] = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="Answer the questions of a file: rows as for training (docs/data.md), or .txt with a"
            " question a line.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --input: where the answers go, as JSON lines.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest, of this share.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from this many likeliest tokens; 0: from all.")
    ] = 20,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.0, help="Above 1: said tokens become less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answers.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Of Qwen3: whether it thinks first. Default: no."),
    ] = None,
    quantization: Annotated[
        str, typer.Option(help="auto (nf4 where the model does not fit the GPU), none, nf4 or int8.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (bf16 where the GPU has it), bf16, fp16 or fp32.")
    ] = "auto",
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
) -> int:
    """Talk with a model: in the terminal, with one prompt, or with the questions of a file.

    Example: qwenlora chat runs/my
    """
    found = finding.find(subject, base=base, trust_remote_code=trust_remote_code)
    sampling = answers.Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    options = chatting.ChatOptions(prompt, input_, output, system, thinking, quantization, dtype)
    return chatting.chat(found, sampling, options)


def compare(
    subjects: Annotated[
        list[str],
        run_argument("RUN", "A run folder, or several, checkpoints, adapters or models."),
    ],
    show: Annotated[int, typer.Option(min=0, help="How many answers to show of each set.")] = 5,
    limit: Annotated[int, typer.Option(min=1, help="How many questions to ask of each set.")] = 500,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    rephrased: Annotated[
        Path | None,
        typer.Option(
            help="Training questions in other words: rows as for training. Default: data.eval=example's."
        ),
    ] = None,
    general: Annotated[
        Path | None,
        typer.Option(help="General questions with checks. Default: the 60 that come with qwenlora."),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(help="The question to ask repeatedly. Default: the first of the training rows."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="How often to ask it.")] = 20,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of these repeated answers.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same answers.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 40,
    output: Annotated[
        Path | None,
        typer.Option(help="Where the numbers go, as JSON. Default: comparison.json of the (last) run."),
    ] = None,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
) -> int:
    """Ask the base model and the tuned one the same: what was trained, in other words, in general.

    Example: qwenlora compare runs/my
    """
    options = questions.CompareOptions(
        show=show,
        limit=limit,
        max_new_tokens=max_new_tokens,
        rephrased=rephrased,
        general=general,
        question=question,
        samples=samples,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        output=output,
    )
    found = [finding.find(name, base=base, trust_remote_code=trust_remote_code) for name in subjects]
    return comparing.compare(found, options)


def export(
    run: Annotated[Path, run_argument("RUN", "A run folder, or one of its checkpoints.")],
    to: Annotated[
        Path | None,
        typer.Option(help="A folder to make, or a .zip file. With --push: none is kept by default."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name on its card. Default: the run folder's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base's hub name for the card, where the run used a folder.")
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", help="Licence, as the hub spells it.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Put it on a model hub, under this name.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: only its owners may see it.")
    ] = False,
    hub: Annotated[
        Literal["huggingface", "modelscope"], typer.Option(help="Where --push puts it.")
    ] = "huggingface",
) -> int:
    """Make a folder for a model hub: the adapter, its tokenizer, and a card filled in from the run.

    Example: qwenlora export runs/my --to my --base Qwen/Qwen3-8B
    """
    if push is not None:
        target = pushing.Target(push, hub, private)
        print(exporting.export_and_push(run, to, target, name=name, base=base, license=license_))
        return 0
    if to is None or private:
        wanted = (
            "--private says how it is pushed; add"
            if private
            else "name a folder, --to tiny, or a repository,"
        )
        raise ValueError(f"{wanted} --push ORG/NAME")
    print(exporting.export(run, to, name=name, base=base, license=license_))
    return 0


def convert_qwen1(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Qwen-7B-Chat, or an adapter for it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
) -> int:
    """Turn a first-generation Qwen (Qwen-7B-Chat), or an adapter for it, into Qwen2's architecture.

    Example: qwenlora convert-qwen1 Qwen-7B-Chat converted
    """
    return convert.convert(source, out, max_shard_size=max_shard_size)
