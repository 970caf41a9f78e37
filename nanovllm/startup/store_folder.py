"""The folder for compiled code. Importing this module does not import torch."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from nanovllm import env
from nanovllm.compile.store import Store, drop_damaged_kernels
from nanovllm.config import EngineConfig
from nanovllm.kernels.code_files import temporary_folder
from nanovllm.kernels.private_files import UnsafePath

logger = logging.getLogger(__name__)


def open_store(config: EngineConfig, *, must_keep: bool = False, has_kernels: bool = True) -> Store:
    """The store of `config`, with Triton's and Inductor's folders in it.

    If it cannot be made, a temporary store is used, or with `must_keep` OSError is raised. Without
    `has_kernels` its kernels are not checked, since this process runs none. Raises ValueError for a
    folder that others own, may write to or could replace, and in "require" mode for one that is not
    a store.
    """
    environment = env.read()
    folder = environment.store_folder(config.compile_cache)
    if config.compile_cache_mode == "require" and not (folder / "entries").is_dir():
        raise ValueError(
            f"compile_cache_mode is 'require', but {folder} is not a store of compiled programs"
        )
    is_default = not config.compile_cache and environment.cache is None
    is_fallback = is_default and folder != env.home_cache()
    if is_fallback:
        message = (
            "compiled code is kept in %s, which the system may delete: %s "
            "(compile_cache or NANOVLLM_CACHE names another folder)"
        )
        home = env.home_cache()
        reason = env.problem_with(home) if home else "the home folder is not known"
        logger.warning(message, folder, reason)
    return use_private_cache(
        folder, must_keep=must_keep, may_be_taken=is_fallback, has_kernels=has_kernels
    )


def use_private_cache(
    folder: Path, *, must_keep: bool = False, may_be_taken: bool = False, has_kernels: bool = True
) -> Store:
    """A store in a folder that only its owner can write, since its code is executed.

    Errors are those of `open_store`. With `may_be_taken`, a temporary store is also used if another
    user has made a folder of this name, or could replace it.
    """
    try:
        store = Store(folder)
    except (OSError, UnsafePath) as error:
        if must_keep or (isinstance(error, UnsafePath) and not may_be_taken):
            raise
        message = (
            "compiled code is not kept, and the next start compiles again: %s "
            "(compile_cache or NANOVLLM_CACHE names a folder that can be written)"
        )
        logger.warning(message, error)
        store = Store(temporary_folder())
    # Dynamo, when imported, writes torch's default, a folder in /tmp, into the environment
    torch_choice = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    default = torch_choice.default_cache_dir() if torch_choice else None
    env.set_default("TORCHINDUCTOR_CACHE_DIR", str(store.folder / "inductor"), also_over=default)
    env.set_default("TRITON_CACHE_DIR", str(store.folder / "triton"))
    # four files per kernel instead of eight, since every start reads all of them
    env.set_default("TRITON_STORE_BINARY_ONLY", "1")
    if has_kernels:
        drop_damaged_kernels(store.folder)
    return store
