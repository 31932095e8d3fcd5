"""A model that somebody has loaded already: transformers' own object, found inside of what may be around it."""

from typing import TYPE_CHECKING, Any

from torch import nn

from sae.base.arguments import described, wrong

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TAKEN = "a name, a folder, or a loaded model of transformers (AutoModelForCausalLM.from_pretrained(...))"


def inside(model: Any) -> "tuple[PreTrainedModel, Any]":
    """Returns transformers' model and, of a pipeline, its tokenizer, else None.

    It is taken out of a pipeline, and of what torch.compile, DataParallel and peft put around it; a prompt that peft
    has learned lies outside of it, and is refused. TypeError for what is no model, or computes with changed modules.
    """
    from transformers import Pipeline, PreTrainedModel

    tokenizer = None
    if isinstance(model, Pipeline):
        model, tokenizer = model.model, model.tokenizer
    model = unwrapped(model)
    if isinstance(model, PreTrainedModel):
        return model, tokenizer
    if type(model).__module__.startswith("transformer_lens"):
        cfg = getattr(model, "cfg", None)
        name = getattr(cfg, "tokenizer_name", None) or getattr(cfg, "model_name", None)
        named = f", here {name!r}" if name else ""
        raise TypeError(
            f"model: {described(model)} has modules and weights of TransformerLens' own; pass the name{named}, or the "
            "model of transformers as it was before"
        )
    raise wrong("model", model, TAKEN)


def unwrapped(model: Any) -> Any:
    """Returns a model without what torch.compile, DataParallel and peft put around it, and anything else as it is."""
    from transformers import PreTrainedModel

    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        around = [getattr(model, name, None) for name in ("_orig_mod", "module")]
        if any(isinstance(inner, nn.Module) for inner in around):
            model = next(inner for inner in around if isinstance(inner, nn.Module))
        elif hasattr(model, "get_base_model"):
            model = _adapted(model)
        else:
            break
    return model


def _adapted(model: Any) -> Any:
    """Returns the model in which peft put its adapters: they are modules of it, and run with it."""
    learned = getattr(model, "active_peft_config", None)
    if getattr(learned, "is_prompt_learning", False):
        kind = getattr(getattr(learned, "peft_type", None), "value", "a learned prompt")
        raise TypeError(
            f"model: {described(model)} puts a learned prompt ({kind}) before the text, which the model inside does "
            "not know; it takes adapters that are modules of the model, such as LoRA"
        )
    return model.get_base_model()
