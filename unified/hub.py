"""Folders that may lie on the Hub."""

from pathlib import Path


def local_folder(name: str | Path) -> Path:
    """A local folder as it is; a repository of the Hub, ``owner/name``, is downloaded."""
    folder = Path(name)
    if folder.exists() or str(folder).startswith((".", "/")) or str(folder).count("/") != 1:
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name)))
