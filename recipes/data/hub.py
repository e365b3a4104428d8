"""Where a data set lies: on the Hugging Face hub, or in a folder of parquet files as the hub has them."""

from __future__ import annotations

from pathlib import Path

import datasets

SPLITS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
"""How the files of a split begin."""


def download_command(repository: str, root: str | Path) -> str:
    """Return the command that downloads ``repository`` to ``root``, as ``root=`` can read it."""
    return f"hf download {repository} --repo-type dataset --local-dir {root}"


def check_folder(repository: str, root: str | Path) -> Path:
    """Return ``root`` if it is a folder.

    Raises:
        FileNotFoundError: with the command that downloads the data.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"root={str(root)!r} is no folder: download the data with `{download_command(repository, root)}`, or "
            "write root=null (data.root=null) to read them from the Hugging Face hub"
        )
    return folder


def find_parquet(repository: str, root: str | Path, splits: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the parquet files of each split under ``root``, at any depth.

    Raises:
        FileNotFoundError: if ``root`` is no folder, or has no file of a split.
        ValueError: if those of a split lie in several folders, as if they were of several data sets.
    """
    folder, files = check_folder(repository, root), {}
    for split in splits:
        found = sorted(path for name in SPLITS[split] for path in folder.rglob(f"{name}-*.parquet"))
        if not found:
            raise FileNotFoundError(
                f"root={str(root)!r} has no {split}-*.parquet: download the data with "
                f"`{download_command(repository, root)}`"
            )
        if len(parents := sorted({str(path.parent) for path in found})) > 1:
            raise ValueError(
                f"root={str(root)!r} has {split}-*.parquet in several folders, as if they were several data sets: "
                f"write one of {', '.join(parents)}"
            )
        files[split] = [str(path) for path in found]
    return files


def load(repository: str, files: dict[str, list[str]] | None, split: str, columns: tuple[str, str]) -> datasets.Dataset:
    """Return one split with the ``columns`` of images and labels; from the hub if there are no ``files``.

    Raises:
        ConnectionError: if the hub cannot be reached, with how to use a local copy.
        PermissionError: if the hub wants to know who asks, with how to tell it.
        ValueError: if a column is missing.
    """
    try:
        if files is None:
            rows = datasets.load_dataset(repository, split=split)
        else:
            rows = datasets.load_dataset("parquet", data_files={split: files[split]}, split=split)
    except ConnectionError as error:
        raise ConnectionError(
            f"{repository} cannot be read from the Hugging Face hub ({error}). Where the hub can be reached, run "
            f"`{download_command(repository, 'DIR')}`, then bring DIR here, and write root=DIR (data.root=DIR)"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise PermissionError(
            f"{error}\nAccept the terms on https://huggingface.co/datasets/{repository} and run `hf auth login`, or "
            "write root= (data.root=) with the folder of a local copy"
        ) from error
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(
            f"{(files or {}).get(split, repository)} has no column {missing[0]!r} but {rows.column_names}: is it "
            f"{repository}?"
        )
    return rows
