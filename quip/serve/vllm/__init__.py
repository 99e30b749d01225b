"""A plugin of vLLM: where quip is installed beside it, vLLM serves our checkpoints.

vLLM finds it by the entry point `vllm.general_plugins` and calls `register` in each of its
processes. `import quip` does not import vLLM.
"""


def register() -> None:
    """Tell vLLM what reads a config.json whose `quant_method` is quip; again is no matter."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from quip.packed.hub import METHOD
    from quip.serve.vllm.config import QuipQuantization

    register_quantization_config(METHOD)(QuipQuantization)
