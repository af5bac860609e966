"""The files that a recipe names: on this disk, built in, or a data set's file on the Hub."""

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from minitune.data.formats import locate
from minitune.data.readers import reader_of
from minitune.errors import UserError
from minitune.files import sha256

ON_THE_HUB = re.compile(  # hf://datasets/OWNER/NAME[@REVISION]/path/file.jsonl, as the Hub writes it
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(convert/[\w-]+|pr/\d+)|[^/]+))?/(?P<file>.+)"
)


def find(names: Iterable[str]) -> dict[str, Path]:
    """The file of each name; those on the Hub are downloaded. Raises UserError with all that are not there."""
    names = list(dict.fromkeys(names))
    if strange := [name for name in names if "://" in name and not ON_THE_HUB.fullmatch(name)]:
        raise UserError(
            f"data.train and data.eval: {', '.join(map(without_secrets, strange))}: a file is on this disk, or on the "
            "Hub as hf://datasets/OWNER/NAME/path/file.jsonl, with @REVISION after NAME where one is meant"
        )
    missing = [name for name in names if "://" not in name and not locate(name).is_file()]
    if missing:
        raise UserError(f"data.train and data.eval name files that are not there: {', '.join(missing)}")
    for name in names:
        reader_of(locate(name))  # of a kind that can be read
    return {name: download(name) if "://" in name else locate(name) for name in names}


def download(name: str) -> Path:
    """The file on this disk, fetched if it is not there yet."""
    from huggingface_hub import errors, hf_hub_download

    parts = ON_THE_HUB.fullmatch(name)
    revision = unquote(parts["revision"]) if parts["revision"] else None
    try:
        return Path(hf_hub_download(parts["repo"], parts["file"], repo_type="dataset", revision=revision))
    except errors.GatedRepoError:
        why = "the Hub asks you to accept its terms there first, and for your token in HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = f"the data set has no revision {revision}"
    except errors.RepositoryNotFoundError:
        why = f"the Hub has no data set {parts['repo']}, or shows it only to your token in HF_TOKEN"
    except errors.LocalEntryNotFoundError:
        why = "the Hub cannot be reached, and the file has not been downloaded before"
    except errors.EntryNotFoundError:
        why = f"the data set {parts['repo']} has no file {parts['file']}"
    except (OSError, ValueError):  # no connection or no room, in all their forms; or a name that nothing can have
        why = "it cannot be fetched from the Hub, or nothing there can have that name"
    raise UserError(f"data: {name}: {why}")


def digests_of(files: dict[str, Path]) -> dict[str, str]:
    """The sha256 of each file's bytes, by its name."""
    try:
        return {name: sha256(path) for name, path in files.items()}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


def without_secrets(name: str) -> str:
    """A name that may hold a password, as user:password@host, fit to be shown."""
    return re.sub(r"//.*@", "//...@", name)
