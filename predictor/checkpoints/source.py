"""Turn what the user wrote after NAME= into a local folder: a path, or a Hugging Face hub id."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from predictor.errors import CheckpointError

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["config.json", "*tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                "generation_config.json", "tokenizer.model", "spiece.model", "chat_template.jinja",
                "additional_chat_templates/*.jinja"]  # fmt: skip
_SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def resolve(source: str, revision: str | None = None) -> Path:
    """The local folder of `source`; a hub id is downloaded (safetensors before pickles) or found in the cache.

    HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN mean what huggingface_hub says they mean.
    Raises `CheckpointError` that says what to do next.
    """
    try:
        folder = Path(source).expanduser()
    except RuntimeError as error:  # "~name" of nobody here
        raise CheckpointError(f"{source} does not exist") from error
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"--revision is for hub ids, and {source} is a folder")
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file; name the folder that holds config.json and the weights")
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"{source} does not exist")
    logger.info("%s is no folder here: asking the Hugging Face hub and its cache", source)
    try:
        local = Path(snapshot_download(source, revision=revision, allow_patterns=_SMALL_FILES + _SAFETENSORS))
        if not any(local.glob("model*.safetensors")):
            local = Path(snapshot_download(source, revision=revision, allow_patterns=_SMALL_FILES + _PICKLES))
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"the hub has no model {source}, or it is private and HF_TOKEN is not set") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{source} is neither a folder nor in the local hub cache, and the hub cannot be reached; "
            "check the path, or download it once with network access"
        ) from error
    except (HfHubHTTPError, OSError, HFValidationError) as error:
        raise CheckpointError(f"downloading {source} from the hub failed: {error}") from error
    return local
