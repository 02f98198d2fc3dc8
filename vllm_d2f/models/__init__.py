# SPDX-License-Identifier: Apache-2.0
"""The models D2F serves: names, configs and classes.

Importing this package loads neither vLLM nor transformers; both are loaded inside the functions.
"""

__all__ = ["ARCHITECTURES", "register_configs", "register_models"]

# The `architectures` entry of a checkpoint's config.json -> the class that runs it.
ARCHITECTURES: dict[str, str] = {
    "DreamModel": "vllm_d2f.models.dream:DreamForD2F",
    "LLaDAModelLM": "vllm_d2f.models.llada:LLaDAForD2F",
}


def register_configs() -> None:
    """Teach transformers the two model types, so that no checkpoint needs `trust_remote_code`.

    Safe to call more than once.
    """
    from transformers import AutoConfig, AutoTokenizer

    from vllm_d2f.models.configuration import DreamConfig, LLaDAConfig
    from vllm_d2f.models.tokenization import DreamTokenizer

    for config_cls in (DreamConfig, LLaDAConfig):
        AutoConfig.register(config_cls.model_type, config_cls, exist_ok=True)
    AutoTokenizer.register(DreamConfig, fast_tokenizer_class=DreamTokenizer, exist_ok=True)


def register_models() -> None:
    """Register configs, tokenizers and model classes with transformers and vLLM.

    Safe to call more than once; the model classes are imported when one is first used.
    """
    from vllm import ModelRegistry

    register_configs()
    for architecture, location in ARCHITECTURES.items():
        # Registering again replaces the entry by an equal one.
        ModelRegistry.register_model(architecture, location)
