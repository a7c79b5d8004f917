"""Find the files that the command line names: files, folders, globs, and parquet files of datasets on the hub."""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from nanogpt.errors import InputError, first_line
from nanogpt.files import file_sha256, regular_file_size
from nanogpt.text.omissions import Omissions

FILE_KINDS = {
    **dict.fromkeys((".txt", ".md", ".raw", ".tokens"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "lines"),
    ".json": "json",
    ".parquet": "parquet",
    ".tar": "tar",
    ".zip": "zip",
    "": "text or binary",  # files without a suffix, such as enwik8
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ALIASES = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
SUPPORTED = ".txt .md .jsonl .ndjson .json .parquet .zip .tar, files without a suffix; .gz .bz2 .xz .zst of these"
OWN_FILES = ("meta.json", "tokenizer.json", "tokenizer_config.json", "progress.json", "done.json")  # no text
CONVERTED = "refs/convert/parquet"  # the branch for the hub's own conversions, as CONFIG/SPLIT/NNNN.parquet


class InputFile(NamedTuple):
    """A file on disk, or if `repo` is set a parquet file of a dataset on the hub."""

    name: str  # path, or path in the repository
    size: int = 0  # bytes; 0: unknown
    mtime_ns: int = 0
    repo: str = ""
    revision: str = ""
    sha256: str = ""
    origin: str = ""  # the input that named it on the hub

    @property
    def text_bytes(self) -> int:
        """Bytes of text, estimated: compression makes English three times smaller."""
        kind, compressions = file_kind(self.name)
        return self.size * (3 if compressions or kind in ("zip", "parquet") else 1)


def file_kind(path: str) -> tuple[str | None, list[str]]:
    """The kind of a file by its name (a value of FILE_KINDS, or None), and its compressions, the outer one first."""
    stem, suffix = os.path.splitext(path.lower())
    stem, suffix = os.path.splitext(stem + ALIASES.get(suffix, suffix))
    compressions = []
    while suffix in COMPRESSIONS:
        compressions.append(suffix)
        stem, suffix = os.path.splitext(stem)
    return FILE_KINDS.get(suffix), compressions


def should_omit(path: str) -> str | None:
    """The kind of omission of a file in a folder or an archive, such as "unknown.csv"; None for one to read."""
    parts = path.replace("\\", "/").split("/")
    if any(part.startswith((".", "__MACOSX")) and part not in (".", "..") for part in parts):
        return "hidden"
    kind, compressions = file_kind(path)
    if kind is None or parts[-1] in OWN_FILES:
        stem = parts[-1].lower().removesuffix("".join(reversed(compressions)))
        suffix = re.search(r"\.[a-z]{1,5}[0-9]?$", stem)  # others, such as .00001, may be many
        return "unknown" + (suffix[0] if suffix else "")
    return None


def find_inputs(
    inputs: list[str], omissions: Omissions, earlier: Sequence[InputFile] = (), skip_bad: bool = False
) -> list[InputFile]:
    """List the files that `inputs` name: files, folders with all below them, globs, hf:OWNER/NAME[@CONFIG][:SPLIT].

    Files of a folder or a glob are sorted by name. A folder gives the files of SUPPORTED kinds; a file named by itself
    is read as text if its kind is unknown. No file comes twice, by whatever names. omissions: counts what is left out.
    earlier: the files of the preparation to resume, which keeps its revisions on the hub.
    Raises InputError for an input that does not exist or holds nothing to read, and unless skip_bad for a file that
    cannot be read, such as a dead link.
    """
    files: dict[Any, InputFile] = {}  # by identity
    for name in inputs:
        on_hub = name.startswith("hf:")
        for identity, file in _find_on_hub(name, earlier) if on_hub else _find_on_disk(name, omissions, skip_bad):
            if identity in files:
                omissions.add("duplicate", file.name)
            else:
                files[identity] = file
    return list(files.values())


def _find_on_disk(name: str, omissions: Omissions, skip_bad: bool) -> Iterator[tuple[Any, InputFile]]:
    try:
        for path in _expand(name, omissions):
            try:
                size = regular_file_size(Path(path))
                with open(path, "rb") as file:
                    status = os.fstat(file.fileno())
            except OSError as error:
                if path == name or not skip_bad:
                    raise
                omissions.add("bad", f"{path}: cannot be read ({error.strerror})")
                continue
            yield (status.st_dev, status.st_ino), InputFile(path, size, status.st_mtime_ns)
    except OSError as error:
        path = error.filename or name
        fix = "give files, folders, globs or hf:OWNER/NAME with --input"
        if path != name:
            fix = "correct it, or leave out what is bad with --skip_bad=True"
        raise InputError(f"{path} cannot be read ({error.strerror}): {fix}") from error


def _expand(name: str, omissions: Omissions) -> list[str]:
    """The paths of a file, a folder or a glob, whose folders are read too."""
    if os.path.isdir(name):
        return _walk(name, omissions)
    if os.path.lexists(name) or not glob.has_magic(name):
        return [name]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        raise InputError(f"no file matches {name}: check the pattern")
    paths = [path for path in matches if not os.path.isdir(path)]
    if "**" not in name:  # which matches the files of the folders itself
        for folder in filter(os.path.isdir, matches):
            paths += _walk(folder, omissions)
    return sorted(paths)


def _walk(top: str, omissions: Omissions) -> list[str]:
    """The files to read below a folder, also in linked folders, sorted by name."""
    paths = []
    visited = set()
    for folder, subfolders, files in os.walk(top, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            omissions.add("duplicate", folder)
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders.sort()
        for path in sorted(os.path.join(folder, file) for file in files):
            if kind := should_omit(os.path.relpath(path, top)):
                omissions.add(kind, path)
            else:
                paths.append(path)
    if not paths:
        raise InputError(f"{top} holds no text: the kinds {SUPPORTED} are read; name other files by a glob")
    return sorted(paths)


def _raise(error: OSError) -> NoReturn:
    raise error


# --- The hub


def _find_on_hub(name: str, earlier: Sequence[InputFile]) -> Iterator[tuple[Any, InputFile]]:
    """List the parquet files of hf:OWNER/NAME[@CONFIG][:SPLIT]; the split is train if not given.

    They are those that the dataset's card gives for the configuration, or else the hub's own conversion.
    """
    match = re.fullmatch(r"hf:([^@:]+)(?:@([^:]+))?(?::(.+))?", name)
    if not match:
        raise InputError(f"{name} is not a dataset on the hub: write hf:OWNER/NAME or hf:OWNER/NAME@CONFIG:SPLIT")
    repo, config, split = match[1], match[2], match[3] or "train"

    def choose(revision: str, paths: list[str], card: Any) -> list[str]:
        if revision == CONVERTED:
            configs = {path.split("/")[0] for path in paths}
            only = next(iter(configs)) if len(configs) == 1 else "default"
            patterns = [f"{config or only}/{split}/*.parquet"]
        else:
            patterns = _card_patterns(card, config, split)
        return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]

    for file in list_parquet(name, repo, choose, earlier):
        yield (file.repo, file.revision, file.name), file


def _card_patterns(card: Any, config: str | None, split: str) -> list[str]:
    """Globs of the files of a split, as the metadata of a dataset's card (README.md) names them."""
    patterns: list[str] = []
    configs = (card or {}).get("configs") or []
    for entry in configs:
        is_default = entry.get("default") or entry.get("config_name") == "default" or len(configs) == 1
        if entry.get("config_name") != config and (config or not is_default):
            continue
        data_files = entry.get("data_files") or []
        for group in data_files if isinstance(data_files, list) else [data_files]:
            if isinstance(group, str):
                group = {"split": "train", "path": group}
            if group.get("split", "train") == split:
                patterns += [group["path"]] if isinstance(group["path"], str) else group["path"]
    return patterns


def list_parquet(
    origin: str,
    repo: str,
    choose: Callable[[str, list[str], Any], list[str]],
    earlier: Sequence[InputFile] = (),
) -> list[InputFile]:
    """List parquet files of a dataset on the hub: on its main branch, or else in the hub's conversion.

    choose: (revision, paths, the card's metadata) -> the paths to take; none: look in the other branch.
    earlier: the files of the preparation to resume, whose own list of this `origin` is kept.
    Raises InputError if the hub cannot be reached or no file is chosen.
    """
    from huggingface_hub import HfApi

    if known := [file for file in earlier if file.origin == origin]:
        return known
    try:
        for revision in ("main", CONVERTED):
            info: Any = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
            parquet = {file.rfilename: file for file in info.siblings if file.rfilename.endswith(".parquet")}
            chosen = [parquet[path] for path in choose(revision, sorted(parquet), info.card_data)]
            if chosen:
                return [
                    InputFile(
                        file.rfilename, file.size or 0, 0, repo, info.sha, getattr(file.lfs, "sha256", ""), origin
                    )
                    for file in chosen
                ]
    except Exception as error:  # the library's network errors have no common class
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{origin} could not be listed ({reason}): check its name and the network") from error
    raise InputError(
        f"{origin} has no complete set of parquet files on the hub: check configuration and split, or download the "
        "files and name them with --input"
    )


def download(source: InputFile, folder: Path) -> Path:
    """Download a file from the hub. Raises InputError if the network fails or the file is damaged."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(
            hf_hub_download(source.repo, source.name, repo_type="dataset", revision=source.revision, local_dir=folder)
        )
    except Exception as error:  # as above
        raise InputError(
            f"{source.name} could not be downloaded ({first_line(error)}): run the command again to resume; if the hub "
            f"no longer has revision {source.revision}, delete {folder} to start over"
        ) from error
    if source.sha256 and file_sha256(path) != source.sha256:
        path.unlink()
        raise InputError(
            f"{source.name} was corrupted during the download (its SHA-256 differs): run the command again"
        )
    return path
