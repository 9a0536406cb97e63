"""`Spool`: tensors by key in bounded memory; what does not fit waits in files of a temporary directory."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import OrderedDict
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Entry = dict[str, Tensor]


class Spool:
    """A mapping of texts to groups of named tensors that keeps at most `max_bytes` of them in memory.

    The least recently used entries go to safetensors files and come back when asked for. The directory goes away
    with the spool.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        self.max_bytes = max_bytes
        self._memory: OrderedDict[str, Entry] = OrderedDict()
        self._files: dict[str, Path] = {}
        self._directory: Path | None = None

    def __getstate__(self) -> dict[str, object]:
        """All entries, wherever they wait: the files stay on this machine."""
        entries = {key: load_file(path) for key, path in self._files.items()} | self._memory
        return {"max_bytes": self.max_bytes, "_memory": OrderedDict(entries), "_files": {}, "_directory": None}

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._files

    @property
    def held_bytes(self) -> int:
        """Bytes in memory now."""
        return sum(_size(entry) for entry in self._memory.values())

    def put(self, key: str, entry: Entry) -> None:
        """Store (or replace) an entry."""
        self._files.pop(key, None)
        self._memory[key] = entry
        self._memory.move_to_end(key)
        self._shrink()

    def get(self, key: str) -> Entry:
        """The entry; raises KeyError when it was never put."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        entry: Entry = load_file(self._files[key])
        self._memory[key] = entry
        self._shrink()
        return entry

    def _shrink(self) -> None:
        while len(self._memory) > 1 and self.held_bytes > self.max_bytes:
            key, entry = self._memory.popitem(last=False)
            if key not in self._files:  # an entry that came from its file is still there
                if self._directory is None:
                    self._directory = Path(tempfile.mkdtemp(prefix="rankopt-"))
                    weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
                path = self._directory / f"{len(self._files)}-{abs(hash(key)):x}.safetensors"
                save_file({name: tensor.contiguous() for name, tensor in entry.items()}, path)
                self._files[key] = path


def _size(entry: Entry) -> int:
    return sum(t.numel() * t.element_size() for t in entry.values())
