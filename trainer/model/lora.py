"""The adapter on a base model: made from the config, or from an adapter that is trained further."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from qwenlora.configs.schema import ALL_LINEAR, Config, Lora
from qwenlora.configs.wording import did_you_mean
from qwenlora.plan.flops import share_of_experts
from qwenlora.plan.widths import widths
from qwenlora.run.format import and_more
from qwenlora.run.records import Parameters
from qwenlora.trainer.model import fused_experts, initial, nf4_loading, patterns, router_loss, targets
from qwenlora.trainer.model.architecture import class_of
from qwenlora.trainer.model.files import check_init_from
from qwenlora.trainer.model.fused_lora import ADAPTER
from qwenlora.trainer.model.kinds import count_kinds, count_trained
from qwenlora.trainer.model.names import VISION, WITHOUT_VISION, has_vision, names_in
from qwenlora.trainer.model.pretrained import load_config_of
from qwenlora.trainer.model.work import work_of

EMBEDDINGS = ("embed_tokens", "lm_head")
NAMES_SHOWN = 40


def lora_config(lora: Lora, tied: bool) -> LoraConfig:
    """Return peft's config. tied: whether the base's embeddings and head are one matrix."""
    saved = list(dict.fromkeys(lora.modules_to_save or ()))
    if tied and any(name in EMBEDDINGS for name in saved):
        # either name trains the one matrix; peft then ties the head's copy to the embeddings' again
        saved = [name for name in saved if name not in EMBEDDINGS] + ["embed_tokens"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        target_parameters=lora.target_parameters,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        exclude_modules=lora.exclude_modules,
        modules_to_save=saved or None,
        trainable_token_indices=lora.trainable_token_indices,
        init_lora_weights=lora.in_files.init_lora_weights,  # initial.py and loop/eva.py begin the others
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        ensure_weight_tying=tied and "embed_tokens" in saved,
    )


def add_lora(
    model: Any,
    lora: Lora,
    revision: str | None = None,
    saved: Path | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Any:
    """Return the model with its adapter, the only trainable part, in float32. revision: of a base from the
    hub; adapter_config.json keeps it, so that peft loads the same base later; saved: the checkpoint that the
    run goes on from; beat: as in initial.begin. Raises: ValueError when the model lacks the named modules, or
    lora.init_from does not fit."""
    check_init_from(lora)
    peft_model = _inject(model, lora, revision, saved)
    if lora.init_lora_weights == "orthogonal" and model.device.type != "meta":
        _begin_orthogonal(peft_model)
    if lora.takes_from_base:
        initial.begin(peft_model, lora, saved, beat)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            # peft leaves modules_to_save in the base's dtype, too coarse for Adam's small steps
            parameter.data = parameter.data.float()
    if lora.init_from:
        _load_adapter(peft_model, lora, Path(lora.init_from).expanduser())
    return peft_model


def _inject(model: Any, lora: Lora, revision: str | None, saved: Path | None) -> Any:
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    modules = [name for name, _ in model.named_modules()]
    _check_names("modules_to_save", lora.modules_to_save, modules)
    if not isinstance(lora.target_modules, str):
        of_experts = targets.taken_for_experts(model, set(lora.target_modules))
        _check_names("target_modules", sorted(set(lora.target_modules) - of_experts), modules)
    _check_names("target_parameters", lora.target_parameters, [name for name, _ in model.named_parameters()])
    _check_tokens(model, lora, tied=tied)
    patterns.check_selection(model, lora)
    settings = lora_config(lora, tied)
    if lora.target_modules == ALL_LINEAR:
        targets.resolve(model, lora, settings, saved)
    if lora.init_lora_weights == "orthogonal":
        _check_orthogonal(model, settings)
    settings.layers_to_transform = lora.layers_to_transform  # not for all-linear, says peft's constructor
    if model.device.type == "meta":
        settings.init_lora_weights = True  # numbers that count nothing
    try:
        with targets.as_named(model, settings) as names, warnings.catch_warnings():
            # peft looks for them among modules alone, not among parameters
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys")
            peft_model = get_peft_model(model, names, revision=revision)
    except (TypeError, ValueError) as error:  # TypeError: of modules that peft cannot train whole
        raise ValueError(_refusal(lora, settings, str(error))) from error
    tuner = peft_model.base_model
    patterns.check_excluded(lora, tuner.targeted_parameter_names)
    written = peft_model.peft_config[ADAPTER]
    if names is not settings:
        written.target_modules, written.target_parameters = (
            settings.target_modules,
            settings.target_parameters,
        )
    if has_vision(model.config):
        written.exclude_modules = patterns.also_excluded(written.exclude_modules, WITHOUT_VISION)
    patterns.check_patterns(lora, written, (*tuner.targeted_module_names, *tuner.targeted_parameter_names))
    if lora.takes_from_base or lora.init_lora_weights == "eva":
        initial.check(peft_model, lora)
    return peft_model


def _refusal(lora: Lora, settings: LoraConfig, of_peft: str) -> str:
    """Return what peft refuses, in terms of the config."""
    if of_peft.startswith("trainable_token_indices cannot be applied"):
        return (
            "lora.trainable_token_indices does not go with LoRA on the same matrix: leave"
            f" {' and '.join(lora.trained_tokens)} out of lora.target_modules"
        )
    refused = {
        "lora_dropout != 0": (f"lora.lora_dropout={lora.lora_dropout}", "0"),
        "use_dora": ("lora.use_dora=true", "false"),
    }
    for theirs, (setting, instead) in refused.items():
        if "ParamWrapper" in of_peft and theirs in of_peft:
            named = sorted(
                settings.target_parameters or (), key=lambda name: (name.endswith(patterns.WEIGHT), name)
            )
            return (
                f"{setting} does not go with LoRA on {named[0]}{and_more(named)}, which peft knows as"
                f" parameters: set it to {instead}, or {_without_parameters(lora, settings, named)}"
            )
    # peft names the modules that the model lacks
    return f"lora.target_modules={lora.target_modules}: {of_peft.splitlines()[0]}"


def _without_parameters(lora: Lora, settings: LoraConfig, named: list[str]) -> str:
    """Return how to have no LoRA on what peft knows as parameters. named: these."""
    if lora.target_modules != ALL_LINEAR:
        return "leave them out of lora.target_modules and lora.target_parameters"
    change, removed = "lora.experts: none", ["lora.target_parameters"] if lora.target_parameters else []
    if lora.experts == "none" or any(name.endswith(patterns.WEIGHT) for name in named):
        change = f"lora.target_modules: [{', '.join(sorted(settings.target_modules or ()))}]"
        removed += ["lora.experts"] if lora.experts != "all" else []
    return change + (f" without {' and '.join(removed)}" if removed else "")


def _check_orthogonal(model: Any, settings: LoraConfig) -> None:
    """Refuse this start where peft's code for it fails. Raises: ValueError."""
    what = ""
    layers = {f"{name}{patterns.WEIGHT}" for name in targets.layers_named_by_weight(model, settings)}
    if parameters := sorted(set(settings.target_parameters or ()) - layers):
        what = f"parameters ({parameters[0]} ...)"
    elif not all(p.is_floating_point() for p in model.parameters()):
        what = "a base whose files are quantised"
    if what:
        raise ValueError(f"lora.init_lora_weights=orthogonal does not go with {what}; set it to gaussian")


def _begin_orthogonal(model: PeftModel) -> None:
    """Make A and B anew as peft does, in float32: it rounds them to the base's dtype, and then their product
    is not zero."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
            continue
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        r = layer.r[ADAPTER]
        rows = torch.linalg.qr(torch.randn(r, r)).Q  # half of them for A, half for B
        a.data = (rows[0::2].T @ torch.randn(r // 2, a.shape[1]) / 10).to(a.device)
        b.data = (torch.randn(b.shape[0], r // 2) @ rows[1::2] / 10).to(b.device)
        if variant := layer.lora_variant.get(ADAPTER):  # DoRA's magnitudes are of both
            variant.init(layer, adapter_name=ADAPTER)


def _check_names(key: str, wanted: list[str] | None, existing: list[str]) -> None:
    """Refuse a name that no module has: peft would ignore it silently."""
    for name in wanted or ():
        if not any(full == name or full.endswith(f".{name}") for full in existing):
            ends = {full.rpartition(".")[2] for full in existing}
            last = sorted(end for end in ends if end and not end.isdecimal())
            otherwise = f"names in it end in {', '.join(last[:NAMES_SHOWN])}"
            raise ValueError(f"lora.{key}: the model has no {name}; {did_you_mean(name, last, otherwise)}")


def _check_tokens(model: Any, lora: Lora, *, tied: bool) -> None:
    """Refuse tokens that the base has no embeddings for. Raises: ValueError."""
    count = model.get_input_embeddings().weight.shape[0]
    for module, ids in lora.trained_tokens.items():
        named = f"lora.trainable_token_indices={lora.trainable_token_indices}"
        if module == "lm_head" and tied:
            raise ValueError(f"{named}: this base's head is its embeddings; write {ids}, which trains both")
        if max(ids) >= count:
            raise ValueError(f"{named}: the base has {count:,} embeddings, expected ids below that")
        if tied and (whole := set(EMBEDDINGS) & set(lora.modules_to_save or ())):
            raise ValueError(
                f"{named}: lora.modules_to_save trains all of {whole.pop()}; leave one of them out"
            )


def _load_adapter(model: PeftModel, lora: Lora, folder: Path) -> None:
    """Put a saved adapter's weights into the model. Raises: ValueError when it does not fit."""
    weights = _without_vision(lora, names_in(model, load_peft_weights(str(folder), device="cpu")))
    try:
        result = set_peft_model_state_dict(model, weights)
    except KeyError as error:  # the adapter lacks a whole module
        raise ValueError(
            f"lora.init_from={lora.init_from} does not fit lora.modules_to_save={lora.modules_to_save}: the"
            f" adapter lacks {error.args[0]}"
        ) from error
    except RuntimeError as error:  # wrong shapes
        raise ValueError(
            f"lora.init_from={lora.init_from} does not fit: {str(error).splitlines()[-1]}"
        ) from error
    trained = {name for name, p in model.named_parameters() if p.requires_grad}  # each once, if it is tied
    missing = [name for name in result.missing_keys if name in trained]
    if missing or result.unexpected_keys:
        name = (missing or result.unexpected_keys)[0]
        raise ValueError(
            f"lora.init_from={lora.init_from} does not fit lora.target_modules={lora.target_modules}:"
            f" {'the adapter lacks' if missing else 'the model lacks'} {name}"
        )


def _without_vision(lora: Lora, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors without those of the vision part, which no row of text has changed. Raises:
    ValueError when they were trained on others."""
    of_vision = {name: values for name, values in weights.items() if VISION in name.split(".")}
    if trained := [name for name, values in of_vision.items() if "lora_A" not in name and bool(values.any())]:
        raise ValueError(
            f"lora.init_from={lora.init_from} changes the vision part ({trained[0]}), which is not trained"
            " here; merge it (qwenlora merge), and begin a new adapter on the merged model"
        )
    return {name: values for name, values in weights.items() if name not in of_vision}


def count_parameters(config: Config, base: str, saved: Path | None = None) -> Parameters:
    """Return the run's parameter counts without loading a weight (on torch's meta device). saved: the
    checkpoint that the run goes on from. Raises: ValueError when the base cannot be quantised, or the adapter
    does not fit it."""
    model_config = load_config_of(config, base)
    with torch.device("meta"):
        model = class_of(model_config).from_config(
            model_config, trust_remote_code=config.model.trust_remote_code, dtype=torch.float32
        )
        total = sum(p.numel() for p in model.parameters())
        head = model.get_output_embeddings().weight
        embeddings = model.get_input_embeddings().weight
        body = total - embeddings.numel() - (0 if head is embeddings else head.numel())
        kinds = count_kinds(model)
        nf4_loading.check(config, model)
        fused_experts.check(config, model)
        router_loss.check(config, model)
        adapted = _inject(model, config.lora, None, saved)
        trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    text = model_config.get_text_config()
    experts = kinds["experts"].total if "experts" in kinds else 0
    return Parameters(
        total=total,
        trainable=sum(trained.values()),
        body=body,
        head=head.numel(),
        layers=text.num_hidden_layers,
        **widths(text, (name for name, _ in model.named_parameters())),
        work=work_of(adapted, text),
        kinds=count_trained(adapted, kinds),
        active=total - experts + round(experts * share_of_experts(text)),
        begun=sum(trained[name] for name in trained if "lora_" in name) * config.lora.takes_from_base,
    )
