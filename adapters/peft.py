"""What do I import in the place of `optimum.neuron.peft`, or of `peft`? The names that people know."""

from adapters.peft_config import LoraConfig
from adapters.peft_layers import GQAQKVColumnParallelLinear, NeuronLoraLayer, ParallelEmbedding, ParallelLinear
from adapters.peft_model import (
    NeuronPeftModel,
    NeuronPeftModelForCausalLM,
    get_original_merged_weights_for_vllm,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
)
from adapters.peft_status import TunerLayerStatus, TunerModelStatus
from adapters.peft_tuner import NeuronLoraModel

PeftModel = NeuronPeftModel
PeftModelForCausalLM = NeuronPeftModelForCausalLM

__all__ = [
    "GQAQKVColumnParallelLinear",
    "LoraConfig",
    "NeuronLoraLayer",
    "NeuronLoraModel",
    "NeuronPeftModel",
    "NeuronPeftModelForCausalLM",
    "ParallelEmbedding",
    "ParallelLinear",
    "PeftModel",
    "PeftModelForCausalLM",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_original_merged_weights_for_vllm",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
]
