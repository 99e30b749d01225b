"""LoRA on packed matrices: peft trains adapters beside them, and the codes stay as they are.

    from peft import LoraConfig, get_peft_model
    from quip.packed.peft import register

    config = register(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(quip.load(folder), config)

peft chooses the adapter of a layer by its class, and knows those of the packages that it names;
others are registered with each config, also with one that is read again:

    config = register(LoraConfig.from_pretrained(adapter))
    model = PeftModel.from_pretrained(quip.load(folder), adapter, config=config)
"""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear

from quip.errors import UnsupportedModel, UsageError
from quip.packed.linear import QuantizedLinear
from quip.packed.stack import StackedLinear

INITIAL = (True, False, "gaussian")  # others start from the dense weight


class PackedLora(Linear):
    """y = W_hat x + b + s B A dropout(x): a packed matrix and its adapters, of rank r each."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}  # the variants of LoRA, such as DoRA, compute with the dense weight

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features  # peft reads them too, with a warning

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        if config.init_lora_weights not in INITIAL:
            raise UsageError(
                f"init_lora_weights={config.init_lora_weights!r} starts from dense weights, and "
                f"these are packed; choose one of {', '.join(map(repr, INITIAL))}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise UnsupportedModel: the sum of both has no codes."""
        raise UnsupportedModel(
            "an adapter cannot be merged into packed matrices; use it beside them, or merge it "
            "into the model of `quip export DIR OUT --dense`"
        )


def register(config: LoraConfig) -> LoraConfig:
    """The config itself, which now takes packed matrices, stacked ones too, as targets."""
    config._register_custom_module({QuantizedLinear: PackedLora, StackedLinear: PackedLora})
    return config
