"""What a token is multiplied with in a model: counted, for plan/flops.py."""

from typing import Any

from qwenlora.plan.flops import attention_widths, recurrence, share_of_experts
from qwenlora.run.records import Work


def work_of(model: Any, text_config: Any) -> Work:
    """Return what a token is multiplied with. model: a base with its adapter, not quantised, on any device;
    text_config: transformers' config of its text part."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    # embeddings are looked up; tied ones are the head, too
    outside = {id(p) for module in (head, embeddings) for p in module.parameters()}
    share = share_of_experts(text_config)
    body = {
        trained: sum(
            p.numel() * (share if "experts" in name.split(".") else 1)
            for name, p in _matrices(model)
            if p.requires_grad == trained and id(p) not in outside
        )
        for trained in (False, True)
    }
    of_head = [p for _, p in _matrices(head)]
    return Work(
        frozen=round(body[False]),
        trained=round(body[True]),
        head_frozen=sum(p.numel() for p in of_head if not p.requires_grad),
        head_trained=sum(p.numel() for p in of_head if p.requires_grad),
        attention=attention_widths(text_config),
        recurrence=recurrence(text_config),
    )


def _matrices(module: Any) -> list[tuple[str, Any]]:
    """Return the parameters that multiply, by name. peft keeps modules_to_save beside an unused original."""
    named = module.named_parameters()
    return [(name, p) for name, p in named if p.ndim > 1 and "original_module" not in name.split(".")]
