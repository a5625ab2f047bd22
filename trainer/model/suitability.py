"""What a base's config.json says against training it: what it is no model for, and RoPE that would depend on
how rows are put into batches."""

from typing import Any

from qwenlora.configs.schema import Config

# endings of transformers' classes, and what such a checkpoint is made for
OTHER_TASKS = {
    "ForSequenceClassification": "to classify texts",
    "ForTokenClassification": "to classify tokens",
    "ForQuestionAnswering": "to mark answers in texts",
    "ForRewardModel": "to rate answers",
}
DEPENDS_ON_BATCH = ("dynamic", "longrope")  # kinds of RoPE that change with the longest row of a batch


def check_task(config: Config, model_config: Any) -> None:
    """Refuse a base that writes no text. model_config: transformers'. Raises: ValueError."""
    for name in getattr(model_config, "architectures", None) or ():
        named = f"model.name_or_path={config.model.name_or_path} is a {name} by its config.json"
        if task := next((use for end, use in OTHER_TASKS.items() if name.endswith(end)), ""):
            raise ValueError(f"{named}, made {task}, not to write them; name a model for text generation")
        if name.endswith("Model") and not name.endswith("LMHeadModel"):
            raise ValueError(
                f"{named}: a model without a head, as those that make embeddings are; name the model for text"
                " generation that it was made from"
            )


def check_lengths(config: Config, model_config: Any, longest: int) -> None:
    """Refuse RoPE that would depend on the batch. longest: tokens of the longest row. Raises: ValueError."""
    kind, limit = rope_type(model_config), _unchanged_up_to(model_config)
    if kind in DEPENDS_ON_BATCH and longest > limit:
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path} has rope_type {kind} in its config.json, which"
            f" changes all rows of a batch once one of them is longer than {limit:,} tokens, and the longest"
            f" here has {longest:,}; set data.max_length: {limit}, or rope_type yarn there"
        )


def notes_on_lengths(model_config: Any, longest: int) -> list[str]:
    """Return what the user is told about rows that are longer than the base is made for. longest: tokens of
    the longest row."""
    limit = _positions(model_config)
    if not limit or longest <= limit:
        return []
    return [
        f"the longest row has {longest:,} tokens, and the base is made for {limit:,} (by its config.json):"
        f" set data.max_length: {limit}, or stretch its positions (YaRN, rope_scaling with factor"
        f" {-(-longest // limit)} in its config.json)"
    ]


def rope_type(model_config: Any) -> str:
    """Return the kind of a model's rotary embeddings, as `default` or `yarn`."""
    return str(_rope(model_config).get("rope_type", "default"))


def _rope(model_config: Any) -> dict[str, Any]:
    return getattr(model_config.get_text_config(), "rope_parameters", None) or {}


def _positions(model_config: Any) -> int:
    """Return how many tokens a row may have by the config; 0 where it does not say."""
    limit = int(getattr(model_config.get_text_config(), "max_position_embeddings", 0) or 0)
    rope = _rope(model_config)
    stretched = (rope.get("original_max_position_embeddings") or limit) * (rope.get("factor") or 1)
    return max(limit, int(stretched))


def _unchanged_up_to(model_config: Any) -> int:
    limit: int = _rope(model_config).get("original_max_position_embeddings", 0)
    return limit or int(model_config.get_text_config().max_position_embeddings)
