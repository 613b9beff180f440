"""The repository on the Hub: whether it can be written, and the upload."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from complexity_deep.workflow.command import InputError, check_output_folder, first_line


def check_target(
    api: HfApi,
    repo_id: str,
    revision: str,
    output_dir: Path,
    *,
    languages: list[str],
    license: str | None,
    base_model: str | None,
    datasets: list[str],
    push: bool,
    public: bool,
) -> None:
    """Raise where the result could not be written or uploaded, before any work is done."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"'{repo_id}' is not a repository name: {first_line(error)}") from error
    if repo_id.count("/") != 1:
        raise InputError(f"'{repo_id}' is not a repository name: write it owner/name.")
    if not re.fullmatch(r"\w[\w.-]*", revision):
        raise InputError(f"--revision '{revision}' is not a tag: use letters, digits, dots, dashes.")
    for language in languages:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
            raise InputError(f"--language '{language}' is not an ISO code: write it as the Hub does, e.g. en.")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise InputError(f"--license '{license}' is not as the Hub spells a licence: e.g. apache-2.0.")
    given = [("--base-model", base_model)] if base_model is not None else []
    for option, name in [*given, *(("--datasets", name) for name in datasets)]:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(f"{option} '{name}' is not an id of the Hub: {first_line(error)}") from error
    if public and not push:
        raise InputError("--public is about --push, which is not given.")
    if output_dir.exists():
        raise InputError(f"'{output_dir}' exists already: remove it, or name another --output-dir.")
    check_output_folder(output_dir.absolute().parent, "The folder of --output-dir,")
    if not push:
        return
    if get_token() is None:
        raise InputError("--push needs a token: run `hf auth login`, or set HF_TOKEN, and give the command again.")
    try:
        api.whoami()
        try:
            is_private = api.repo_info(repo_id).private
            tags = [ref.name for ref in api.list_repo_refs(repo_id).tags]
        except RepositoryNotFoundError:
            return
    except Exception as error:  # the library under the Hub's client, and so its errors, depend on the version
        raise InputError(f"The Hub does not let us push to '{repo_id}': {first_line(error)}") from error
    if revision in tags:
        raise InputError(f"'{repo_id}' has a tag '{revision}', which others may have pinned: give a new --revision.")
    if is_private == public:
        state = "private: leave out --public" if is_private else "public: add --public"
        raise InputError(f"'{repo_id}' exists and is {state}, or change that on the Hub first.")


def push_folder(api: HfApi, folder: Path, repo_id: str, revision: str, *, public: bool) -> None:
    """Upload the folder and tag it with the revision; `InputError` says how to go on where that fails."""
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Export {revision}")
        api.create_tag(repo_id, tag=revision)
    except Exception as error:  # the library under the Hub's client, and so its errors, depend on the version
        raise InputError(
            f"The upload to '{repo_id}' failed ({first_line(error)}), but '{folder}' is complete: when the cause is "
            f"gone, give `hf upload {repo_id} {folder}` and `hf repos tag create {repo_id} {revision}`."
        ) from error
