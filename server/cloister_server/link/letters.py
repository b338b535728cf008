"""Contents of messages as files, one folder for each letter, so that a model never passes through SQLite.

    letters/RUN/to/NODE/MESSAGE/            ``pulled``, what the hospital is told of the message; and its objects
    letters/RUN/from/NODE/MESSAGE/REPLY/    ``said``, what the hospital told of its reply; ``names`` of all its objects;
                                            and those of them that have come

Whose a letter is, is where it lies: a hospital's objects are looked for under that hospital's node alone. An object is
a file named by its SHA-256; what several letters hold is one file with several names. Nothing is flushed to disk: what
a power cut takes costs a repeat of the round.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from mmap import ACCESS_READ, mmap
from pathlib import Path

from cloister_server.cores import each
from cloister_shared.carried import Octets

_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Letter:
    """A message on its way to a hospital."""

    node: int
    message: str
    pulled: bytes
    objects: Collection[str]


class Letters:
    """The letters of all runs, in one folder. Every name is checked: it may be a hospital's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    # --- to a hospital ---------------------------------------------------------------------------------------
    def post(self, run: int, letters: Iterable[Letter], contents: Mapping[str, Octets]) -> None:
        """Lay down letters, each whole or not at all; what several of them hold is written once."""
        written = dict[str, Path]()
        for letter in letters:
            place = self._place(run, "to", letter.node, letter.message)
            building = place.with_name(f"{letter.message}.new")
            building.mkdir(parents=True)
            new = [name for name in letter.objects if name not in written]
            each(lambda name, to=building: (to / name).write_bytes(contents[name]), new)
            for name in letter.objects:
                if name in written:
                    os.link(written[name], building / name)
            written |= {name: place / name for name in new}
            (building / "pulled").write_bytes(letter.pulled)
            building.rename(place)

    def pulled(self, run: int, node: int, message: str) -> bytes | None:
        """What the hospital is told of a message to it."""
        return _read(self._place(run, "to", node, message) / "pulled")

    def parts(self, run: int, node: int, message: str) -> int:
        """Of how many objects a message consists."""
        try:
            return len(os.listdir(self._place(run, "to", node, message))) - 1
        except FileNotFoundError:
            return 0

    def find(self, run: int, node: int, name: str) -> memoryview | None:
        """An object of a message to this hospital, read from the disk as it is used."""
        named(name)
        with suppress(FileNotFoundError):
            for message in self._place(run, "to", node).iterdir():
                with suppress(FileNotFoundError), (message / name).open("rb") as file:
                    return memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))
        return None

    # --- from a hospital -------------------------------------------------------------------------------------
    def reply(self, run: int, node: int, message: str, reply: str) -> Path:
        """The folder of a reply."""
        return self._place(run, "from", node, message, reply)

    def receive(self, run: int, node: int) -> Incoming:
        """Room for an object of a reply of this hospital.

        Raises:
            FileNotFoundError: no reply of it was announced.
        """
        return Incoming(self._place(run, "from", node))

    def drop(self, run: int, node: int, message: str) -> None:
        """Remove a message and whatever answers it."""
        for way in ("to", "from"):
            shutil.rmtree(self._place(run, way, node, message), ignore_errors=True)

    def runs(self) -> list[int]:
        """The runs that have letters."""
        return [int(name) for name in os.listdir(self._folder) if name.isdecimal()]

    def drop_run(self, run: int) -> None:
        """Remove all letters of a run."""
        shutil.rmtree(self._folder / str(run), ignore_errors=True)

    def _place(self, run: int, way: str, node: int, *names: str) -> Path:
        return self._folder.joinpath(str(run), way, str(node), *map(named, names))


# --- one reply, in the folder that ``Letters.reply`` names -----------------------------------------------------
def announce(place: Path, said: bytes, objects: Collection[str], along: Iterable[bytes] = ()) -> list[str]:
    """A reply will consist of these objects, some of which come ``along``; those that are still to come.

    It may be said again. Another reply to the same message makes way for it; that there is none yet which counts, the
    caller knows.
    """
    if not (place / "said").exists():
        for other in place.parent.glob("*"):
            shutil.rmtree(other, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        for file, content in (("names", " ".join(map(named, objects)).encode()), ("said", said)):
            _put(place / file, content)
    missing = _names(place) - set(os.listdir(place))
    came = {name: content for content in along if (name := sha256(content).hexdigest()) in missing}
    for name, content in came.items():
        _put(place / name, content)
    return sorted(missing - came.keys())


def _put(path: Path, content: bytes) -> None:
    """Write a file that is whole when it is there."""
    beside = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
    beside.write_bytes(content)
    beside.rename(path)


def take(place: Path, name: str, incoming: Incoming) -> bool:
    """An object of a reply came; whether the reply is whole.

    Raises:
        FileNotFoundError: it was not announced, or the reply is not wanted any more.
        ValueError: it is another object.
    """
    if incoming.name != named(name):
        raise ValueError("its SHA-256 is not its name")
    names = _names(place)
    if name not in names:
        raise FileNotFoundError(name)
    incoming.path.rename(place / name)
    return names <= set(os.listdir(place))


def _names(place: Path) -> set[str]:
    return set((place / "names").read_text().split())


def said(place: Path) -> bytes | None:
    """What a hospital told of its reply."""
    return _read(place / "said")


class Incoming:
    """An object that is being received: a file that ``close`` removes unless it was taken."""

    def __init__(self, place: Path) -> None:
        self.path = place / f"coming-{os.urandom(8).hex()}"
        self._file = self.path.open("xb", buffering=0)
        self._hash = sha256()

    @property
    def name(self) -> str:
        """The name of what came so far."""
        return self._hash.hexdigest()

    def write(self, parts: Iterable[bytes]) -> None:
        """More of it came."""
        for part in parts:
            self._hash.update(part)
            self._file.write(part)

    def close(self) -> None:
        """It is taken, or not wanted."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def is_name(name: str) -> bool:
    """Whether it has the form of an object's name."""
    return bool(_NAME.fullmatch(name))


def named(name: str) -> str:
    """The name of an object, once it is sure to be one.

    Raises:
        ValueError: it is none.
    """
    if not is_name(name):
        raise ValueError("an object is named by its SHA-256")
    return name


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
