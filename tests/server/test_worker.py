"""The process that runs one study, where it cannot."""

from contextlib import nullcontext
from types import SimpleNamespace

from cloister_server import worker


def test_a_model_that_needs_a_package_that_is_not_here_stops_the_study(world, monkeypatch):
    """And does not end the process, which would only be begun again, for ever."""
    names = [world.enrol(name).name for name in ("North", "South", "East")]
    digest, consortium = world.submit(*names), world.consortium
    consortium.registry.move(digest, "running")

    def run_study(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'monai'", name="monai")

    monkeypatch.setattr(worker, "run_study", run_study)
    monkeypatch.setattr(worker, "_gather", lambda *_: None)
    monkeypatch.setattr(worker, "open_link", lambda _: SimpleNamespace(run=lambda _: nullcontext()))
    worker.work(consortium.folder, digest)
    study = consortium.registry.study(digest)
    said = "This needs monai, which is not installed. Run pip install 'cloister[imaging]'."
    assert (study.state, study.reason) == ("stopped", said)
