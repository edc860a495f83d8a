"""Files of a remote store by URL (s3://..., memory://...), through fsspec."""

from typing import IO, Any


def is_remote(source: object) -> bool:
    """Whether a source is a URL rather than a path."""
    return "://" in str(source)


def find(url: str) -> tuple[Any, str, dict[str, dict[str, Any]]]:
    """A URL's fsspec file system, its root there, and the details of its files, sorted by path.

    A `*` in the last part of the URL selects files: `s3://BUCKET/data/validation_unique-*.parquet`.
    """
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url)
        if "*" in root:
            return files, root.rpartition("/")[0], dict(sorted(files.glob(root, detail=True).items()))
        return files, root, dict(sorted(files.find(root, detail=True).items()))
    except Exception as error:  # each store raises its own types
        raise _unreachable(url, error) from None


def open_file(url: str) -> IO[bytes]:
    """Open a file of a store for reading."""
    import fsspec

    try:
        file: IO[bytes] = fsspec.open(url, "rb").open()
        return file
    except Exception as error:  # as in `find`
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: Exception) -> ValueError:
    return ValueError(
        f"{url}: cannot be reached ({type(error).__name__}); download it on a machine with network "
        "access and give its folder in params.yaml"
    )
