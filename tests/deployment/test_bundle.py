"""The install without a network: what is in it, and that it installs where there is none."""

import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cloister_shared.console import EXTRAS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


@pytest.fixture
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "client/deploy/bundle.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A cloister of one line, with the command of a hospital."""
    files = {
        "cloister_client.py": "def main():\n    print('Usage: cloister-site')\n",
        "cloister-9.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: cloister\nVersion: 9.0\n",
        "cloister-9.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "cloister-9.0.dist-info/entry_points.txt": "[console_scripts]\ncloister-site = cloister_client:main\n",
    }
    digests = {n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).rstrip(b"=") for n, t in files.items()}
    record = "".join(f"{name},sha256={digest.decode()},\n" for name, digest in digests.items())
    path = tmp_path / "cloister-9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (files | {"cloister-9.0.dist-info/RECORD": record}).items():
            archive.writestr(name, text)
    return path


@pytest.fixture
def unpacked(maker: ModuleType, wheel: Path, tmp_path: Path) -> Path:
    """A bundle of that wheel alone, unpacked as a hospital does."""
    tar = maker.bundle("site", [wheel], tmp_path / "dist")
    with tarfile.open(tar) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / tar.stem


def install(folder: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run install.sh as at a hospital: no index answers and, where the kernel lets us, there is no network."""
    alone = ["unshare", "--net"] if shutil.which("unshare") else []
    if alone and subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        alone = []
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": "", "PYTHON": sys.executable}
    return subprocess.run(
        [*alone, "sh", folder / "install.sh", target],
        env=os.environ | nowhere | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_requirement_states_the_hash_of_the_wheel(maker, wheel):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    said = f"cloister[site,records]==9.0 --hash=sha256:{digest}\n"
    assert maker.requirements([wheel], ("site", "records")) == said


def test_whatever_a_hospital_is_told_to_install_its_bundle_can_hold(maker):
    optional = PROJECT["project"]["optional-dependencies"]
    held = {Requirement(one).name for extra in (*maker.EXTRAS["site"], *maker.MORE) for one in optional[extra]}
    assert {Requirement(one).name for extra in EXTRAS.values() for one in optional[extra]} <= held


@pytest.mark.parametrize("role", ["site", "coordinator"])
def test_all_that_a_bundle_may_hold_is_pinned(maker, role):
    """Every wheel that pip would ask for, those of the extras' own requirements too."""
    pins = {canonicalize_name(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    optional = PROJECT["project"]["optional-dependencies"]
    ours = [wanted for extra in (*maker.EXTRAS[role], *maker.MORE) for wanted in optional[extra]]
    todo, seen = [Requirement(wanted) for wanted in (*ours, *PROJECT["project"]["dependencies"])], set[str]()
    while todo:
        one = todo.pop()
        key = f"{canonicalize_name(one.name)}[{','.join(sorted(one.extras))}]"
        marked = not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in ("", *one.extras))
        if key in seen or not marked or one.name.startswith(("nvidia", "triton", "cuda")):
            continue  # torch's for CUDA, which no bundle holds
        seen.add(key)
        assert canonicalize_name(one.name) in pins, one.name
        for line in metadata.requires(one.name) or ():
            need = Requirement(line)
            if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in ("", *one.extras)):
                need.marker = None
                todo.append(need)


@pytest.mark.parametrize(
    ("name", "loose"),
    [
        ("torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", []),
        ("typing_extensions-4.16.0-py3-none-any.whl", []),
        ("torch-2.12.0-cp311-cp311-manylinux_2_28_x86_64.whl", ["torch==2.12.0"]),
        ("left_pad-1.0-py3-none-any.whl", ["left-pad==1.0"]),
    ],
)
def test_every_wheel_is_one_that_cloister_is_tested_with(maker, name, loose):
    assert maker.unpinned([Path(name)], "torch==2.13.0\ntyping_extensions==4.16.0\n") == loose


@pytest.mark.parametrize(
    ("names", "oldest"),
    [
        (["a-1-py3-none-any.whl"], "2.5"),
        (["a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"], "2.17"),
        (["a-1-cp311-cp311-manylinux2014_x86_64.manylinux_2_28_x86_64.whl"], "2.17"),
        (["a-1-cp311-cp311-manylinux2014_x86_64.whl", "b-1-cp311-abi3-manylinux_2_28_x86_64.whl"], "2.28"),
    ],
)
def test_the_oldest_glibc_is_the_newest_that_a_wheel_needs(maker, names, oldest):
    assert maker.glibc([Path(name) for name in names]) == oldest


def test_the_same_wheels_make_the_same_bundle(maker, wheel, tmp_path):
    first = maker.bundle("site", [wheel], tmp_path / "first").read_bytes()
    os.utime(wheel, (0, 0))
    assert maker.bundle("site", [wheel], tmp_path / "second").read_bytes() == first


def test_a_bundle_is_for_a_hospital_or_a_coordinator():
    done = subprocess.run(
        [sys.executable, ROOT / "client/deploy/bundle.py", "sim"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "A bundle is for one of site, coordinator, not for sim.\n")


def test_what_is_added_is_known(maker):
    with pytest.raises(SystemExit, match="--with adds one of waveforms, molecules, export, not dev"):
        maker.main("site", "dist", ["dev"])


def test_what_is_added_is_asked_for_and_in_the_name(maker, wheel, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(maker, "collect", lambda extras, to: asked.append(extras) or [wheel])
    maker.main("site", str(tmp_path), ["export", "molecules"])
    assert asked == [("site", "records", "imaging", "molecules", "export")]
    (tar,) = tmp_path.glob("*.tar")
    assert tar.stem.endswith("-molecules-export")
    assert f"{tar.name}" in capsys.readouterr().out
    with tarfile.open(tar) as archive:
        wanted = archive.extractfile(f"{tar.stem}/requirements.txt")
        assert wanted
        assert wanted.read().startswith(b"cloister[site,records,imaging,molecules,export]==9.0 --hash=")


def test_every_file_of_a_bundle_is_summed(unpacked):
    subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=unpacked, check=True)
    summed = {line.split("  ")[1] for line in (unpacked / "SHA256SUMS").read_text().splitlines()}
    assert summed == {"README", "install.sh", "requirements.txt", "wheels/cloister-9.0-py3-none-any.whl"}


def test_the_readme_fits_a_screen(unpacked):
    lines = (unpacked / "README").read_text().splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 120


def test_a_damaged_bundle_is_not_installed(unpacked, tmp_path):
    (unpacked / "requirements.txt").write_text("cloister\n")
    done = install(unpacked, tmp_path / "venv")
    assert done.returncode == 1
    assert "A file of the bundle is damaged." in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_folder_that_is_there_is_left_alone(unpacked, tmp_path):
    (tmp_path / "venv").mkdir()
    done = install(unpacked, tmp_path / "venv")
    assert done.returncode == 1
    assert "exists. Name another folder" in done.stderr
    assert list((tmp_path / "venv").iterdir()) == []


def test_another_python_is_told_before_anything_is_made(unpacked, tmp_path):
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    done = install(unpacked, tmp_path / "venv", PYTHON=str(other))
    assert f"This bundle is for Python {sys.version_info.major}.{sys.version_info.minor}" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
def test_a_wheel_of_another_hash_is_not_installed_and_nothing_is_left(unpacked, tmp_path):
    requirements = unpacked / "requirements.txt"
    text = requirements.read_text()
    requirements.write_text(text[:-9] + "00000000\n")
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in [requirements])
    (unpacked / "SHA256SUMS").write_text(sums)
    done = install(unpacked, tmp_path / "venv")
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
def test_the_bundle_of_a_hospital_installs_without_a_network(tmp_path):
    try:
        subprocess.run([sys.executable, ROOT / "client/deploy/bundle.py", "site", tmp_path], check=True)
        (tar,) = tmp_path.glob("cloister-site-*.tar")
        with tarfile.open(tar) as archive:
            archive.extractall(tmp_path, filter="data")
        done = install(tmp_path / tar.stem, tmp_path / "venv")
        assert done.returncode == 0, done.stderr
        here = tmp_path / "venv/bin"
        shown = subprocess.run([here / "cloister-site", "--help"], capture_output=True, text=True, check=True)
        assert shown.stdout.startswith("Usage: cloister-site")
        connectors = "import duckdb, fhir.resources, gdcm, monai, nibabel, orjson, PIL, psycopg, pydicom, sqlalchemy"
        subprocess.run([here / "python", "-P", "-c", connectors], check=True)
        whole = subprocess.run([here / "python", "-m", "pip", "check"], capture_output=True, text=True, check=False)
        assert whole.returncode == 0, whole.stdout
    finally:
        shutil.rmtree(tmp_path)  # two gigabytes


@pytest.mark.slow
def test_the_wheel_holds_the_four_packages_whole_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("cloister-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = {
        str(path.relative_to(ROOT / Path(package).parent))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == ours
    assert {f"{Path(package).name}/py.typed" for package in PACKAGES} <= held
    assert {f"cloister_shared/control{end}" for end in (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py")} <= held
    assert "cloister_server/migrations/versions/v0001_records.py" in held
    assert wheel.stat().st_size < 1_000_000
