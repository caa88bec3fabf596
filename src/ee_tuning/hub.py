"""What a path means: a folder here or an id of the hub, and the hub's failures in a line."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers.utils import cached_file

from ee_tuning.errors import UserError, first_line
from ee_tuning.files import check_folder

TIMEOUT = 10.0  # seconds for the hub's answer


def find_file(path: str, name: str) -> Path | None:
    """The file of this name in a folder or, fetched, of a hub id; None: there is none."""
    found = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def check_there(path: str, what: str, file: str, kind: str = "model") -> None:
    """Refuse at once what is neither a folder, or a GGUF file, nor to be had from the hub, after
    one try.

    what: how messages call it. file: one that it has on the hub. kind: model or dataset.

    Raises:
        UserError: says which of the two it is not, and why.
    """
    if Path(path).is_file() and not path.endswith(".gguf"):
        folder = Path(path).parent
        whose = f"its folder, {folder}" if (folder / file).exists() else f"a folder with a {file}"
        raise UserError(f"cannot read the {what} {path}: it is a file, give {whose}")
    if Path(path).exists():
        return
    check_folder(path, what)
    nothing = f"cannot read the {what} {path}: there is no such folder"
    try:
        if isinstance(try_to_load_from_cache(path, file, repo_type=kind), str):
            return
        get_hf_file_metadata(hf_hub_url(path, file, repo_type=kind), timeout=TIMEOUT)
    except EntryNotFoundError:
        return  # it is there, and says itself what it lacks
    except GatedRepoError:
        raise UserError(
            f"cannot read the {what} {path}: accept its terms on https://huggingface.co/{path}, "
            "then log in with: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{nothing}, nor is it on the hub; a private one needs: hf auth login"
        ) from None
    except OfflineModeIsEnabled:
        raise UserError(
            f"{nothing}, it is not in the hub's cache, and with HF_HUB_OFFLINE the hub is not asked"
        ) from None
    except HFValidationError as error:
        raise UserError(f"{nothing}, and it is no hub id: {first_line(error)}") from None
    except HfHubHTTPError as error:
        raise UserError(f"{nothing}, and the hub says: {first_line(error)}") from error
    except Exception as error:  # of the hub's HTTP client, which is one or another
        raise UserError(f"{nothing}, and the hub cannot be reached: {first_line(error)}") from error
