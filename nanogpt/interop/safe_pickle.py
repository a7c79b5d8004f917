"""Read pickles as plain data: nothing in them is executed."""

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, ClassVar

# The opcodes of pickled dicts, lists, strings and numbers.
PLAIN_OPCODES = (
    b"\x80\x95.("  # protocol, frame, end, mark
    b"\x94qrhj"  # memoize, get
    b"}su]ae)t\x85\x86\x87"  # dicts, lists, tuples
    b"X\x8cJKM\x8aGN\x88\x89"  # strings, numbers, None, True, False
    b"c\x93"  # a class or function, for find_class to refuse by its name
)
# The functions that torch.save names for dicts and tensors. torch.load allows more, such as a bytearray of any size.
PLAIN_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (?!\w*Tensor)\w+"
)


class PlainUnpickler(pickle._Unpickler):
    """Reads dicts, strings and numbers; raises UnpicklingError before any class or function could run.

    Built on Python's own reader: the one in C allocates gigabytes if a pickle of ten bytes says so.
    """

    dispatch: ClassVar = {code: pickle._Unpickler.dispatch[code] for code in PLAIN_OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def refuse_code(path: Path, size: int) -> None:
    """Raise ValueError if reading a ckpt.pt of `size` bytes would run code or allocate more than that.

    torch.load, even with weights_only=True, refuses neither every function nor a compressed archive.
    """
    with path.open("rb") as file:
        pickles: list[Any] = [file] * 5  # the oldest format: three numbers, the content, the names of the storages
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            if any(entry.compress_type or entry.file_size > size for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
            pickles = [archive.open(entry) for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
        else:
            file.seek(0)
        for content in pickles:
            for code, name, _ in pickletools.genops(content):
                if "GLOBAL" in code.name and not PLAIN_GLOBALS.fullmatch(str(name)):
                    raise ValueError(f"it would run {str(name).replace(' ', '.')}")
