"""Vectors on the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faststeer.files import FormatError
from faststeer.formats.files import Written, load, to_bytes
from faststeer.vector import SteeringVector

FILE = "steering_vector.safetensors"


def push(
    vector: SteeringVector,
    repo: str,
    filename: str = FILE,
    *,
    format: Written | None = None,
    model_hint: str | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a vector to the model repository `repo` ("user/name"), which is made if it is not there. Returns the
    commit's address.

    Args:
        filename: in the repository.
        format, model_hint: as for `save`: a control vector of llama.cpp where the name ends in .gguf.
        private: for a repository that is made.
        revision: branch; default: main.
        token, endpoint: where not those of huggingface_hub's own settings.

    Raises:
        huggingface_hub.errors.HfHubHTTPError, OSError: refused or not reached.
        ValueError: a repository name that cannot be one; what `save` refuses, before anything is made.
    """
    from huggingface_hub import HfApi

    data = to_bytes(vector, filename, format, model_hint)
    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo(repo, private=private, exist_ok=True)
    done = api.upload_file(
        path_or_fileobj=data,
        path_in_repo=filename,
        repo_id=repo,
        revision=revision,
        commit_message=f"Steering vector at {vector.at}, layers {', '.join(map(str, vector.layers))}",
    )
    return str(done.commit_url)


def pull(
    repo: str,
    filename: str = FILE,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    **said: Any,
) -> SteeringVector:
    """Download a vector's file, of any format that `load` reads, and read it.

    Args:
        said: what the file leaves unsaid, as for `load`.

    Raises:
        FileNotFoundError: no such repository, revision or file.
        OSError: the hub cannot be reached and the file is not in the cache.
        FormatError: as for `load`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = hf_hub_download(repo, filename, revision=revision, token=token, endpoint=endpoint, cache_dir=cache_dir)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        where = f"{repo}@{revision}" if revision else repo
        if isinstance(error, LocalEntryNotFoundError):
            raise OSError(
                f"{filename} of {where} is not in the cache, and the hub cannot be reached: {error}"
            ) from error
        raise FileNotFoundError(f"no {filename} in {where} on the hub: {error}") from error
    return load(Path(path), **said)


def parse(address: str) -> dict[str, str]:
    """`hub:user/name[@revision][/file]` as the arguments of `push` and `pull`.

    Raises:
        FormatError: not of that form.
    """
    owner, _, rest = address.removeprefix("hub:").partition("/")
    name, _, filename = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise FormatError(f"{address!r}: expected hub:user/name, hub:user/name@revision or hub:user/name/file")
    parts = {"repo": f"{owner}/{name}"}
    if filename:
        parts["filename"] = filename
    if revision:
        parts["revision"] = revision
    return parts
