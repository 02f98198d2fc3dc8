# SPDX-License-Identifier: Apache-2.0
"""Which attention backend serves a D2F model on CUDA, and what vLLM may capture around it."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

PATH = "vllm_d2f.attention.flashinfer.BlockCausalBackend"

HEAD_SIZES = (64, 128, 256)
"""Head sizes that FlashInfer has kernels for. Published models have them, embedded ones have 32."""


def register() -> None:
    """Take vLLM's name for a plugin's backend, CUSTOM, unless another plugin has taken it."""
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, PATH)


def prepare(vllm_config: "VllmConfig") -> None:
    """Choose the backend, and which CUDA graphs it can be part of.

    FlashInfer is the default. It means the backend of this package, because vLLM's own sizes its
    buffers for `max_num_seqs` sequences, and here every open block is a sequence. Other backends
    stay selectable, and vLLM chooses one for head sizes that FlashInfer does not have.

    A FULL graph records how many sequences a batch has, and FLASH_ATTN and TRITON_ATTN keep
    buffers for `max_num_seqs` of them in that mode. A window has as many sequences as open blocks,
    so with these backends only the layers between the attention layers are captured. The backend of
    this package can be part of a FULL graph (`vllm_d2f.attention.cuda_graphs`), and is by default:
    on an H200 a step of one request of a 7B shape took 8.1 instead of 11.4 ms, larger batches took
    as long as before, and all answers were the reference's.

    Raises:
        ValueError: FlashInfer is requested and not installed, or lacks the head size, or another
            plugin has taken its name.
    """
    attention = vllm_config.attention_config
    attention.use_non_causal = True
    wanted, lack = attention.backend, None
    head_size = vllm_config.model_config.get_head_size()
    if head_size not in HEAD_SIZES:
        lack = f"FlashInfer has no heads of {head_size}, only of {HEAD_SIZES}"
    elif find_spec("flashinfer") is None:
        lack = "FlashInfer is not installed (pip install flashinfer-python)"
    if wanted is None and lack is not None:
        # Only tiny models have other heads, and their users need no faster kernel.
        say = logger.info if head_size not in HEAD_SIZES else logger.warning
        say("%s; vLLM chooses the attention backend.", lack)
    elif wanted in (None, AttentionBackendEnum.FLASHINFER):
        if lack is not None:
            raise ValueError(
                f"--attention-backend FLASHINFER: {lack}; give --attention-backend TRITON_ATTN or "
                "leave the option out"
            )
        if AttentionBackendEnum.CUSTOM.get_path() != PATH:
            raise ValueError(
                "another plugin has registered its attention backend as CUSTOM: "
                f"{AttentionBackendEnum.CUSTOM.get_path()}. Leave it out of VLLM_PLUGINS, or give "
                "--attention-backend FLASH_ATTN"
            )
        attention.backend = AttentionBackendEnum.CUSTOM
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    own = attention.backend is AttentionBackendEnum.CUSTOM
    if mode is None:
        both, piecewise = CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.PIECEWISE
        compilation.cudagraph_mode = both if own else piecewise
    elif mode.has_full_cudagraphs() and not own:
        logger.warning(
            "Only the FlashInfer backend of D2F can be part of a FULL graph: cudagraph_mode %s "
            "becomes PIECEWISE",
            mode,
        )
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
