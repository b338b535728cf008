"""An install without a network: every wheel of Cloister for this platform, with hashes, in one tar file.

``make bundle`` runs it for a hospital, ``make bundle ARGS=coordinator`` for a consortium, and
``make bundle ARGS="--with molecules"`` adds an extra that not everybody needs. pip asks whatever index it is set up
with. torch is the build without CUDA; where the index does not hold it, ``TORCH_INDEX`` names one that does.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = {"site": ("site", "records", "imaging"), "coordinator": ("coordinator", "postgres", "imaging")}
"""What of the distribution each role installs, the image of its Dockerfile as well: a hospital reads FHIR, OMOP and
pictures; the coordinator makes the same untrained models, of which the large ones of pictures are MONAI's."""
MORE = ("waveforms", "molecules", "export")
"""What ``--with`` adds."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

README = """\
The command {command}, for Python {python} on {platform} with glibc {glibc} or newer. No root, no network.
The extras in it: {extras}. What needs another says which.
Before you trust it: compare the digest of the tar file (sha256sum) with the one that its sender told you otherwise.
Install: `sh install.sh [FOLDER]` makes a virtual environment there, or in ~/{name}.
Upgrade: install the new bundle into a new folder, stop the old program, start the new one; going back is the same.
Remove: delete the folder. Keys, configuration and data lie elsewhere and stay.
"""

# Wheels that load on glibc 2.28 (RHEL 8, Debian 10, Ubuntu 20.04) and newer, whatever this machine runs: as torch.
NEWEST_GLIBC = 28


def platforms() -> list[str]:
    """The platform tags to ask pip for, best first; none where this is not Linux, and pip takes this machine's."""
    if sys.platform != "linux":
        return []
    tags = [f"manylinux_2_{minor}" for minor in range(NEWEST_GLIBC, 4, -1)] + [
        "manylinux2014",
        "manylinux2010",
        "manylinux1",
    ]
    return [f"--platform={tag}_{os.uname().machine}" for tag in tags]


def named(wheel: Path) -> tuple[str, str]:
    """The normalised project name and the version that a wheel's file name states."""
    name, version = wheel.name.split("-")[:2]
    return re.sub(r"[-_.]+", "-", name).lower(), version


def unpinned(wheels: Sequence[Path], constraints: str) -> list[str]:
    """The wheels, as ``name==version``, that the constraints do not name; +cpu is left aside."""
    lines = (line.split("==") for line in constraints.splitlines() if "==" in line)
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}
    found = (named(wheel) for wheel in wheels)
    return [f"{n}=={v}" for n, v in found if n != "cloister" and pins.get(n) != v.partition("+")[0]]


def requirements(wheels: Sequence[Path], extras: Sequence[str]) -> str:
    """A line for each wheel with the SHA-256 of its bytes, for ``pip install --require-hashes``."""
    lines = []
    for wheel in sorted(wheels):
        name, version = named(wheel)
        asked = f"[{','.join(extras)}]" if name == "cloister" else ""
        lines.append(f"{name}{asked}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    return "".join(lines)


def glibc(wheels: Sequence[Path]) -> str:
    """The oldest glibc on which all the wheels load; every wheel supports the oldest of the versions it names."""
    old = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
    needs = [(2, 5)]
    for wheel in wheels:
        tag = wheel.name.rsplit("-", 1)[1]
        modern = [(int(a), int(b)) for a, b in re.findall(r"manylinux_(\d+)_(\d+)_", tag)]
        if either := modern + [version for name, version in old.items() if f"{name}_" in tag]:
            needs.append(min(either))
    return "{}.{}".format(*max(needs))


def pack(folder: str, files: Mapping[str, Path | str], to: Path) -> None:
    """Write a tar file of one folder; the same files give the same bytes."""
    with tarfile.open(to, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in sorted(files.items()):
            data = content.encode() if isinstance(content, str) else content.read_bytes()
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size, info.mode = len(data), 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(info, io.BytesIO(data))


def bundle(role: str, wheels: Sequence[Path], to: Path, more: Sequence[str] = ()) -> Path:
    """Pack the wheels with what installs them; the tar file's path, which names what there is ``more``."""
    version = next(version for name, version in map(named, wheels) if name == "cloister")
    platform = sysconfig.get_platform().replace("-", "_")
    name = "-".join([f"cloister-{role}", version, f"cp{PYTHON.replace('.', '')}", platform, *more])
    command, extras = f"cloister-{role}", (*EXTRAS[role], *more)
    install = (Path(__file__).parent / "install.sh").read_text()
    files: dict[str, Path | str] = {f"wheels/{wheel.name}": wheel for wheel in wheels}
    files["requirements.txt"] = requirements(wheels, extras)
    files["install.sh"] = install.replace("@COMMAND@", command).replace("@PYTHON@", PYTHON)
    files["README"] = README.format(
        name=name, command=command, python=PYTHON, platform=platform, glibc=glibc(wheels), extras=", ".join(extras)
    )
    files["SHA256SUMS"] = "".join(
        f"{hashlib.sha256(c.encode() if isinstance(c, str) else c.read_bytes()).hexdigest()}  {n}\n"
        for n, c in sorted(files.items())
    )
    to.mkdir(parents=True, exist_ok=True)
    pack(name, files, to / f"{name}.tar")
    return to / f"{name}.tar"


def collect(extras: Sequence[str], to: Path) -> list[Path]:
    """Build Cloister's wheel and download those of everything that extras need, at the versions of constraints.txt.

    Raises:
        SystemExit: pip failed, torch is the build for CUDA, or a wheel is not pinned.
    """
    pip = [sys.executable, "-m", "pip"]
    index = os.environ.get("TORCH_INDEX")
    _run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(to), str(ROOT)])
    (ours,) = to.glob("cloister-*.whl")
    _run(
        [*pip, "download", "--quiet", "--only-binary", ":all:", "--dest", str(to), "--constraint", "constraints.txt"]
        + platforms()
        + (["--extra-index-url", index] if index else [])
        + [f"{ours}[{','.join(extras)}]"]
    )
    wheels = sorted(to.glob("*.whl"))
    if cuda := [wheel.name for wheel in wheels if wheel.name.startswith(("nvidia_", "triton", "cuda_"))]:
        sys.exit(f"The index gave torch for CUDA ({cuda[0]}). Set TORCH_INDEX to an index of torch's CPU wheels.")
    if loose := unpinned(wheels, (ROOT / "constraints.txt").read_text()):
        sys.exit(f"Not pinned in constraints.txt: {', '.join(loose)}. Add them, so that every bundle is the same.")
    return wheels


def _run(command: Sequence[str]) -> None:
    """Run pip; where it fails it has said why."""
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit("pip could not get what the bundle needs; its own words are above.")


def main(role: str, to: str, more: Sequence[str]) -> None:
    """Write the bundle of one role and print its path, size and digest."""
    if role not in EXTRAS:
        sys.exit(f"A bundle is for one of {', '.join(EXTRAS)}, not for {role}.")
    if unknown := [extra for extra in more if extra not in MORE]:
        sys.exit(f"--with adds one of {', '.join(MORE)}, not {unknown[0]}.")
    more = [extra for extra in MORE if extra in more]  # in one order, so that the same bundle has the same bytes
    with tempfile.TemporaryDirectory() as folder:
        path = bundle(role, collect((*EXTRAS[role], *more), Path(folder)), ROOT / to, more)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{os.path.relpath(path)}  {path.stat().st_size / 1e6:.0f} MB\nsha256 {digest}")


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description="Pack an install of Cloister without a network.")
    asked.add_argument("role", nargs="?", default="site", help="site or coordinator (site)")
    asked.add_argument("to", nargs="?", default="dist", help="folder for the tar file (dist)")
    asked.add_argument("--with", dest="more", nargs="+", action="extend", default=[], help=f"more: {', '.join(MORE)}")
    main(**vars(asked.parse_args()))
