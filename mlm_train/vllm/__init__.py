"""MemoryLLM in vLLM: a plugin that vLLM finds by its entry point `vllm.general_plugins` (docs/vllm.md)."""


def register() -> None:
    """Tell vLLM of the models of kinds memory and flex; `base` is a Llama, which it knows.

    vLLM calls it in each of its processes, in some more than once. The model is imported where it runs.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from mlm_train.checkpoint.hf.transformers_config import MemoryLLMConfig

    AutoConfig.register(MemoryLLMConfig.model_type, MemoryLLMConfig, exist_ok=True)
    ModelRegistry.register_model("MemoryLLMForCausalLM", "mlm_train.vllm.model:MemoryLLMForCausalLM")
