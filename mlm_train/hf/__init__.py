"""MemoryLLM in Hugging Face transformers: importing this package registers it with the Auto classes.

    import mlm_train.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("exports/mine", tol="tol/mine")

No code comes from the model's folder: `trust_remote_code` is not needed.
"""

_INSTALL = "mlm_train.hf needs transformers 5: pip install 'mlm-train[hf]'"

try:
    import transformers
except ImportError:
    raise ImportError(_INSTALL) from None
if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"{_INSTALL} (installed: {transformers.__version__})")

from mlm_train.checkpoint.hf.transformers_config import MemoryLLMConfig  # noqa: E402 - needs transformers
from mlm_train.hf.modeling import MemoryLLMForCausalLM, MemoryLLMModel  # noqa: E402

__all__ = ["MemoryLLMConfig", "MemoryLLMForCausalLM", "MemoryLLMModel"]

transformers.AutoConfig.register(MemoryLLMConfig.model_type, MemoryLLMConfig, exist_ok=True)
transformers.AutoModel.register(MemoryLLMConfig, MemoryLLMModel, exist_ok=True)
transformers.AutoModelForCausalLM.register(MemoryLLMConfig, MemoryLLMForCausalLM, exist_ok=True)
